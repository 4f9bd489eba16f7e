"""Maps the top-level folders onto one import package; every other fact is in pyproject.toml."""

from setuptools import find_packages, setup

ROOTS = ("proto", "ckpt", "runtime", "launcher")
FOLDERS = [*ROOTS, *(f"{root}.{sub}" for root in ROOTS for sub in find_packages(root))]

setup(
    packages=[f"holdfast.{folder}" for folder in FOLDERS],
    package_dir={f"holdfast.{root}": root for root in ROOTS},
    package_data={"": ["py.typed", "*.pyi", "*.proto", "maps/*.toml"]},
)
