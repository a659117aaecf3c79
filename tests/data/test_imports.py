"""`data/` imports nothing else of the package but `text`, `files` and `progress`: no model, and nothing of `runtime/`."""

import subprocess
import sys


def test_data_imports_only_itself():
    program = """if True:
        import pkgutil, sys
        import bilevel_jax.data
        for module in pkgutil.walk_packages(bilevel_jax.data.__path__, "bilevel_jax.data."):
            __import__(module.name)
        print(sorted(name for name in sys.modules if name.startswith("bilevel_jax.") and not name.startswith("bilevel_jax.data")))
    """
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        == "['bilevel_jax.errors', 'bilevel_jax.files', 'bilevel_jax.progress', 'bilevel_jax.random_streams', 'bilevel_jax.text']\n"
    )
