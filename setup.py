"""Adds the folder `configs` to the installed package as `bilevel_jax.configs`. Everything else is in setup.cfg."""

import setuptools

setuptools.setup(
    packages=[*setuptools.find_packages(include=["bilevel_jax*"]), "bilevel_jax.configs"],
    package_dir={"bilevel_jax.configs": "configs"},
)
