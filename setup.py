"""Maps the top-level folders ``proposers`` and ``kernels`` into the one import package ``vllm_specplug``.

They must never install as top-level packages: ``kernels`` is the name of another well-known distribution.
"""

from setuptools import find_packages, setup

FOLDERS = {"vllm_specplug.proposers": "proposers", "vllm_specplug.kernels": "kernels"}

setup(
    packages=["vllm_specplug"] + [f"vllm_specplug.{p}" for p in find_packages("vllm_specplug")] + list(FOLDERS),
    package_dir={"": ".", **FOLDERS},
)
