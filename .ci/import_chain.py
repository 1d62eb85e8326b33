"""Print the longest chain of imports that loading a module starts, and fail where it is longer than `LIMIT`.

Imports inside functions, which wait until they are needed, do not count.
"""

import ast
import functools
import sys
from pathlib import Path

LIMIT = 12
PACKAGE = Path(__file__).parents[1] / "metaembed_jax"


def module_name(path: Path) -> str:
    """Return the dotted name of a file of the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


@functools.cache
def longest_chain(module: str) -> tuple[str, ...]:
    """Return the longest chain that a module begins, itself first."""
    imported = set()
    for node in ast.parse(MODULES[module].read_text()).body:
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    chains = (longest_chain(name) for name in sorted(imported & MODULES.keys() - {module}))
    return (module, *max(chains, key=len, default=()))


if __name__ == "__main__":
    chain = max(map(longest_chain, sorted(MODULES)), key=len)
    print(f"longest chain of imports: {len(chain)} modules, at most {LIMIT}")
    if len(chain) > LIMIT:
        sys.exit("\n  imports ".join(chain))
