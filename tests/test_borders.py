import ast
import importlib
import importlib.metadata
import inspect
import json
import os
import pickle
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import kdcache
from kdcache.core import errors
from kdcache.core.errors import KdcacheError

HEAVY = ("torch", "torchvision", "zarr")
COMMAND = "from kdcache.cli.app import main; main()"


def subclasses(cls):
    return [each for child in cls.__subclasses__() for each in (child, *subclasses(child))]


ERRORS = [each for each in [KdcacheError, *subclasses(KdcacheError)] if each.__module__ == errors.__name__]


def imported_after(code, *arguments):
    """The heavy packages that a fresh process has imported when `code` ends, also where it ends by sys.exit; stdout."""
    script = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script + code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stderr.splitlines()[-1], done.stdout


@pytest.mark.parametrize(
    ("code", "arguments", "printed"),
    [
        ("import kdcache; print(kdcache.KdcacheError.exit_code)", [], "1"),
        (COMMAND, ["--help"], "train-student"),
        (COMMAND, ["train-student", "--help"], "--temperature"),
        (COMMAND, ["dump-teacher", "--help"], "--encoding"),
    ],
    ids=["import", "help", "train-student help", "dump-teacher help"],
)
def test_what_must_answer_at_once_imports_nothing_heavy(code, arguments, printed):
    found, stdout = imported_after(code, *arguments)
    assert printed in stdout
    assert found == "[]"


def test_a_cache_is_read_without_torch(tmp_path, make_manifest, make_rows, write_split):
    manifest = make_manifest(chunk_rows=2, compression="zstd:3", dtype="float64")
    rows = make_rows(manifest)
    write_split(tmp_path / "c.zarr", manifest, rows)
    found, stdout = imported_after(
        "import json, kdcache\n"
        "cache, splits = kdcache.open_cache(sys.argv[1]), kdcache.cache_splits(sys.argv[1])\n"
        "print(json.dumps([cache.rows([3, 0]).tolist(), cache.column('labels').tolist(), splits]))",
        tmp_path / "c.zarr",
    )
    assert found == "[]"
    assert json.loads(stdout) == [rows["logits"][0][[3, 0]].tolist(), rows["labels"][0].tolist(), ["train"]]


def test_a_border_that_is_crossed_is_seen():
    assert imported_after("import kdcache; kdcache.Cache; import zarr")[0] == "['zarr']"


def test_all_is_sorted_and_true():
    assert kdcache.__all__ == sorted(kdcache.__all__)
    assert kdcache.__all__ == sorted(kdcache._HOMES)
    for name, home in kdcache._HOMES.items():
        found = getattr(kdcache, name)
        assert (found.__name__ if inspect.ismodule(found) else found.__module__) == home
    with pytest.raises(AttributeError, match="'kdcache' has no attribute 'nothing'"):
        _ = kdcache.nothing


def test_what_type_checkers_see_is_what_is_imported():
    source = inspect.getsource(kdcache)
    seen = {
        name.strip(): f"{home}.{name.strip()}" if name.strip() in kdcache._MODULES else home
        for home, names in re.findall(r"^    from (kdcache\S*) import (.+)$", source, re.MULTILINE)
        for name in names.split(",")
    }
    assert seen == kdcache._HOMES


# ---- the tree of errors


def tree_of_errors():
    """The tree in the docstring of errors.py: name → (exit code, the builtin)."""
    tree = {}
    for line in errors.__doc__.splitlines():
        if found := re.match(r"    (?:│   )?(?:[├└]── )?(\w+)(?: +exit (\d))?(?: +\((\w+)\))?", line):
            name, code, builtin = found.groups()
            tree[name] = (int(code or 1), builtin)
    return tree


def test_the_tree_in_the_docstring_is_the_tree():
    assert {error.__name__: error.exit_code for error in ERRORS} == {
        name: code for name, (code, _) in tree_of_errors().items()
    }
    for name, (_, builtin) in tree_of_errors().items():
        bases = getattr(errors, name).__bases__
        if name == "KdcacheError":
            assert bases == (Exception,)
        else:
            assert [base.__name__ for base in bases] == (["KdcacheError", builtin] if builtin else ["DatasetError"])


def test_every_error_of_the_package_is_in_the_tree():
    for module in pkgutil.walk_packages(kdcache.__path__, "kdcache."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    strangers = [e for e in subclasses(KdcacheError) if e.__module__.startswith("kdcache") and e not in ERRORS]
    assert strangers == []


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("parts", [("found 3",), ("found 3", "needed 4"), ("found 3", "needed 4", "do this")])
def test_an_error_keeps_its_parts(error, parts):
    # Errors come out of DataLoader workers by pickle.
    for problem in (error(*parts), pickle.loads(pickle.dumps(error(*parts)))):
        assert type(problem) is error
        assert (problem.found, problem.needed, problem.remedy) == (*parts, "", "")[:3]
        assert str(problem).splitlines() == [
            each for each, _ in zip(("found 3", "  needed: needed 4", "  to do:  do this"), parts, strict=False)
        ]


@pytest.mark.parametrize("error", [each for each in ERRORS if issubclass(each, OSError)])
def test_an_os_error_has_no_made_up_errno(error):
    problem = error("found", "needed", "remedy")
    assert (problem.errno, problem.filename) == (None, None)


# ---- the installation

ROOT = Path(__file__).parent.parent


def test_the_package_is_found_from_the_parent_folder_of_a_clone(tmp_path):
    """A folder named kdcache in the current one is a namespace package for Python, if nothing else is found first."""
    (tmp_path / "kdcache").symlink_to(ROOT)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", "import kdcache; print(kdcache.open_cache.__name__)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("open_cache\n", "")


def imported_modules():
    """Top-level names of the third-party modules that the package imports anywhere, also by `require_extra`."""
    names = set()
    for path in (ROOT / "kdcache").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.partition(".")[0])
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require_extra":
                names |= {each.value.partition(".")[0] for each in node.args[:1] if isinstance(each, ast.Constant)}
    return names - set(sys.stdlib_module_names) - {"kdcache"}


def declared():
    """Name of each declared distribution, of `dependencies` and of the extras for users."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name, each in extras.items() if name != "dev" for line in each)]
    return {re.match(r"[\w-]+", line)[0].lower() for line in lines} - {"kdcache"}


def test_what_is_imported_is_declared():
    homes = importlib.metadata.packages_distributions()
    needed = {name: {home.lower().replace("_", "-") for home in homes.get(name, [name])} for name in imported_modules()}
    assert len(needed) > 10
    assert {name for name, homes in needed.items() if not homes & declared()} == set()


def test_what_is_declared_is_imported():
    homes = importlib.metadata.packages_distributions()
    used = {home.lower().replace("_", "-") for name in imported_modules() for home in homes.get(name, [name])}
    # h5py and lmdb are what `make bench` compares with; torch.onnx imports onnx and onnxscript, transformers' Trainer
    # accelerate, and users its datasets.
    assert declared() - used - {"h5py", "lmdb", "onnx", "onnxscript", "accelerate", "datasets"} == set()


def test_windows_is_refused_in_words():
    """Without fcntl, which Windows lacks, a lock could not be held."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['fcntl'] = None; import kdcache.core.file_lock"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "needed: Linux or macOS" in done.stderr
    assert "WSL" in done.stderr
