"""Varied prompts for the end-to-end tests, made from templates: 8 kinds, deterministic, no two alike."""

from __future__ import annotations

_TOPICS = (
    ("the tides", "the moon pulls on the sea, and the shore meets high water twice a day"),
    ("bread", "flour, water, salt and yeast become dough, and the oven turns dough into bread"),
    ("bees", "a colony holds one queen, many workers and, in summer, a few hundred drones"),
    ("the tram line", "the line runs from the harbour to the hospital every ten minutes until midnight"),
    ("glaciers", "snow that does not melt becomes ice, and the ice moves slowly downhill"),
    ("chess", "each side has sixteen pieces, and the game ends when a king cannot escape"),
    ("the library", "members may borrow six books for three weeks and renew them twice"),
    ("windmills", "the sails turn a shaft, the shaft turns the stones, and the stones grind the grain"),
    ("tomatoes", "the plants want sun, a stake to lean on and water at the root, not on the leaf"),
    ("lighthouses", "each light has its own rhythm, so that a sailor can tell one from another"),
    ("soap", "fat and lye are stirred until they thicken, then poured into moulds to cure"),
    ("the old bridge", "it was built of stone in 1742, widened in 1890 and closed to cars in 1998"),
)

_KINDS = (
    ("chat", "Tell me three things about {topic}, one sentence each."),
    ("translate", "Translate to French: About {topic}: {fact}."),
    ("summarise", "Summarise in one sentence. Text: We learned about {topic}. In short, {fact}. {Fact}. That is all."),
    (
        "code",
        "Add a docstring to this function and print it whole:\n"
        "def describe_{n}(name, count):\n    text = name + ' x ' + str(count)\n    return text.strip()\n# {topic}",
    ),
    (
        "maths",
        "Anna has {n} coins and finds {m} more near {topic}. She gives away 3. How many remain? Show each step.",
    ),
    ("list", "Make a numbered list of ten short words that have to do with {topic}."),
    ("retrieval", "Passage 1: {fact}.\nPassage 2: nothing to see.\nQuestion: what does passage 1 say about {topic}?"),
    ("json", 'Return only JSON: {{"topic": ..., "fact": ..., "length": ...}} about {topic}: {fact}.'),
)


def chat_prompts(count: int) -> list[str]:
    """``count`` user messages (at most 96), every kind about equally often."""
    made = []
    for n, (topic, fact) in enumerate(_TOPICS):
        for _, template in _KINDS:
            made.append(template.format(topic=topic, fact=fact, Fact=fact[0].upper() + fact[1:], n=n + 11, m=2 * n + 5))
    # A stride coprime to the total, so that any prefix of the list mixes kinds and topics.
    return [made[i * 37 % len(made)] for i in range(count)]
