"""The packages of the wheel; everything else is in pyproject.toml. conf/ travels inside the package, as sjd2/conf."""

from setuptools import find_namespace_packages, setup

TOP = ("sjd2", "baselines", "evaluation", "harness", "sweeps", "benchmarks")

setup(
    packages=[*find_namespace_packages(include=[f"{name}{rest}" for name in TOP for rest in ("", ".*")]), "sjd2.conf"],
    package_dir={"sjd2.conf": "conf"},
    package_data={
        "": ["py.typed"],
        "sjd2": ["models/tiny/**/*"],
        "sjd2.conf": ["**/*.yaml"],
        "benchmarks": ["conf/**/*.yaml"],
        "sweeps": ["tables/*.csv", "wandb/*.yaml", "report/*"],
    },
)
