"""The house stands: every import points to a lower floor, and config records load without jax."""

import ast
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
FLOORS = [{"ops"}, {"parallel"}, {"model", "data"}, {"training", "inference"}, {"evals", "perf"}, {"configs"}]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imported_rooms(path: pathlib.Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names} & FLOOR.keys()


def test_imports_point_down():
    for room, floor in FLOOR.items():
        for path in sorted((ROOT / room).rglob("*.py")):
            if path.name == "__main__.py":
                continue  # a door, as train.py and infer.py are
            for other in imported_rooms(path) - {room}:
                assert FLOOR[other] < floor, f"{path.relative_to(ROOT)} imports {other}/, not below {room}/"


def test_every_module_says_what_it_is():
    for room in FLOOR:
        for path in sorted((ROOT / room).rglob("*.py")):
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path.relative_to(ROOT)} has no docstring"


def test_configs_load_without_jax():
    code = "import sys, configs.base; assert not {'jax', 'flax', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
