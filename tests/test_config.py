"""edgeopt.toml and flags -> RunConfig."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from edgeopt.config import RunConfig, config_of, load_config, resolve_gates
from edgeopt.config_keys import KEYS, template
from edgeopt.config_values import PASS_NAMES
from edgeopt.errors import ConfigError
from edgeopt.types import Gates


def write(folder: Path, text: str, name: str = "edgeopt.toml") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    return path


def error_line(path: Path | None = None, **flags: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, flags)
    assert caught.value.exit_code == 2
    return caught.value.line()


def test_every_field_has_a_key_and_every_key_a_field() -> None:
    derived = {"gates_off", "config_dir", "step"}  # [[step]] is no flag
    assert {key.name for key in KEYS} == {field.name for field in fields(RunConfig)} - derived


def test_defaults_without_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(None, {}) == RunConfig()


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, 'target = "android-int8"\nthreads = 4\nseed = 7\n')
    config = load_config(None, {"threads": "2", "target": [], "seed": None})
    assert (config.threads, config.seed, config.target) == (2, 7, ("android-int8",))
    assert config.num_calibration_samples == 128


def test_flags_alone_read_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "threads = 4\n")
    assert config_of({"model": "net.py:build", "target": ["android-int8"], "keep_float": "head"}) == RunConfig(
        model="net.py:build", target=("android-int8",), keep_float=("head",)
    )
    with pytest.raises(ConfigError, match=r"--calibraton: unknown key; did you mean 'calibration'\?"):
        config_of({"calibraton": None})


def test_a_named_file_replaces_the_one_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "threads = 4\n")
    assert load_config(write(tmp_path, "seed = 3\n", "other.toml"), {}).threads == 1


def test_a_model_flag_replaces_the_example_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, 'example = "digits"\n')
    config = load_config(path, {"model": "net.py:build"})
    assert (config.model, config.example) == ("net.py:build", None)


def test_paths_in_the_file_start_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "project" / "pictures").mkdir(parents=True)
    (tmp_path / "project" / "bert").mkdir()
    (tmp_path / "project" / "package").mkdir()
    write(
        tmp_path / "project",
        """
        model = "net.py:build"
        weights = "w.safetensors"
        labels = "/abs/labels.txt"
        calibration = "pictures"
        evaluation = "package.data:held_out"
        target = ["android-int8", "mine.toml"]
        metric = "score.py:f1"
        output-dir = "out"
        """,
    )
    config = load_config(Path("project/edgeopt.toml"), {})
    assert config.model == "project/net.py:build"
    assert config.weights == Path("project/w.safetensors")
    assert config.labels == Path("/abs/labels.txt")
    assert config.calibration == "project/pictures"
    assert config.evaluation == "package.data:held_out"
    assert config.target == ("android-int8", "project/mine.toml")
    assert config.metric == "project/score.py:f1"
    assert config.output_dir == Path("project/out")
    assert config.config_dir == Path("project")
    moved = {"hf:bert": "hf:project/bert", "hf:org/name": "hf:org/name", "package:f": "package:f"}
    for source, expected in moved.items():
        write(tmp_path / "project", f'model = "{source}"')
        assert load_config(Path("project/edgeopt.toml"), {}).model == expected


def test_a_target_named_like_a_folder_stays_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "project" / "android-int8").mkdir(parents=True)
    write(tmp_path / "project", 'target = "android-int8"')
    assert load_config(Path("project/edgeopt.toml"), {}).target == ("android-int8",)


def test_flags_start_from_the_current_folder(tmp_path: Path) -> None:
    path = write(tmp_path / "project", "")
    config = load_config(path, {"model": "net.py:build", "output_dir": Path("dist")})
    assert (config.model, config.output_dir) == ("net.py:build", Path("dist"))


def test_preprocessing_from_the_table_from_a_file_and_from_a_flag(tmp_path: Path) -> None:
    (tmp_path / "tokens").mkdir()
    table = 'kind = "text"\ntokenizer = "tokens"\nmax-length = 16\n'
    expected = {"kind": "text", "tokenizer": str(tmp_path / "tokens"), "max-length": 16}
    assert load_config(write(tmp_path, f"[preprocessing]\n{table}"), {}).preprocessing == expected
    bare = write(tmp_path, table, "bare.toml")
    assert load_config(write(tmp_path, 'preprocessing = "bare.toml"'), {}).preprocessing == expected
    assert load_config(write(tmp_path, ""), {"preprocessing": bare}).preprocessing == expected
    nested = write(tmp_path, f"[preprocessing]\n{table}", "nested.toml")
    assert load_config(write(tmp_path, ""), {"preprocessing": nested}).preprocessing == expected


@pytest.mark.parametrize(("given", "expected"), [("0.5%", 0.005), (" 2 % ", 0.02), ("0.01", 0.01), (0, 0.0), (1, 1.0)])
def test_fractions_may_be_percentages(tmp_path: Path, given: object, expected: float) -> None:
    assert load_config(write(tmp_path, ""), {"max_accuracy_drop": given}).max_accuracy_drop == pytest.approx(expected)


def test_gates_of_the_user_replace_those_of_the_target_one_by_one(tmp_path: Path) -> None:
    target = Gates(max_accuracy_drop=0.01, min_sqnr_db=10.0, min_speedup=1.0, max_size_bytes=100)
    path = write(tmp_path, 'max-accuracy-drop = "0.5%"\nmin-speedup = "off"\nmax-latency-ms = 3\n')
    config = load_config(path, {"max_size_mb": "1.5", "max_latency_ms": "off"})
    assert resolve_gates(target, config) == Gates(max_accuracy_drop=0.005, min_sqnr_db=10.0, max_size_bytes=3 << 19)
    assert config.gates_set == {"max_accuracy_drop", "min_speedup", "max_latency_ms", "max_size_bytes"}
    assert config.gates_off == {"min_speedup", "max_latency_ms"}


def test_without_gates_the_target_decides() -> None:
    target = Gates(min_agreement=0.9)
    assert resolve_gates(target, RunConfig()) == target
    assert RunConfig().gates_set == frozenset()


def test_a_percentile_chooses_its_estimator(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "percentile = 99.9"), {})
    assert (config.estimator, config.percentile) == ("percentile", 99.9)
    assert "means nothing to the mse estimator" in error_line(write(tmp_path, "percentile = 99.9"), estimator="mse")


def test_an_unknown_key_is_named_with_line_and_nearest(tmp_path: Path) -> None:
    path = write(tmp_path, "# a comment\nthreads = 1\n\nmax_acuracy_drop = 0.1\n")
    assert error_line(path) == f"{path}:4: max_acuracy_drop: unknown key; did you mean 'max-accuracy-drop'?"
    path = write(tmp_path, "[gates]\nmin-speedup = 1\n")
    assert error_line(path).startswith(f"{path}:1: gates: unknown key")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("threads = 0", "threads: 0 is not a whole number of at least 1"),
        ("threads = true", "threads: True is not a whole number of at least 1"),
        ("threads = 1.5", "threads: 1.5 is not a whole number of at least 1"),
        ("model = 3", "model: 3 is not a text"),
        ('model = " "', "model: ' ' is not a text"),
        ("target = [1]", "target: 1 is not a text"),
        ("target = 1", "target: 1 is neither a text nor a list of texts"),
        ('estimator = "minmax"', "estimator: 'minmax' is not known; did you mean 'min-max'? give one of"),
        ("io = 8", "io: 8 is not known; give one of float, int8"),
        ("max-accuracy-drop = 2", "max-accuracy-drop: 2 is not between 0 and 1; write a fraction (0.005)"),
        ('max-accuracy-drop = "x%"', "max-accuracy-drop: 'x' is not a number"),
        ("min-speedup = -1", "min-speedup: -1 is not above 0"),
        ("min-sqnr-db = nan", "min-sqnr-db: nan is not a number"),
        ("max-latency-ms = inf", "max-latency-ms: inf is not a number"),
        ("percentile = 20", "percentile: 20 is not a percentile"),
        ("float-twin = 1", "float-twin: 1 is neither true nor false"),
        ('name = "a/b"', "name: 'a/b' can't name a folder"),
        ('name = "../b"', "name: '../b' can't name a folder"),
        ("preprocessing = 1", "preprocessing: 1 is not a table; write it as [preprocessing]"),
        ('seed = "12345678901234567890"', "is more than"),
    ],
)
def test_a_wrong_value_is_one_clear_line(tmp_path: Path, text: str, problem: str) -> None:
    path = write(tmp_path, f"\n{text}\n")
    line = error_line(path)
    assert line.startswith(f"{path}:2: ")
    assert problem in line
    assert "\n" not in line


def test_a_wrong_flag_is_named_as_a_flag(tmp_path: Path) -> None:
    assert error_line(write(tmp_path, ""), threads="many") == "--threads: 'many' is not a whole number of at least 1"


def test_an_unreadable_file_is_one_clear_line(tmp_path: Path) -> None:
    path = write(tmp_path, "model = \n")
    assert error_line(path).startswith(f"{path}:1: is not TOML: Invalid value")
    assert error_line(tmp_path / "absent.toml") == f"{tmp_path}/absent.toml: no such file; 'edgeopt init' writes one"
    path.write_bytes(b'model = "\xff"')
    assert error_line(path) == f"{path}: can't be read: not UTF-8"
    assert error_line(tmp_path) == f"{tmp_path}: can't be read: Is a directory"


def test_the_template_loads_as_it_is_and_names_every_key(tmp_path: Path) -> None:
    text = template()
    assert load_config(write(tmp_path, text), {}) == RunConfig(config_dir=tmp_path)
    for key in KEYS:
        assert re.search(rf"^# \[?{key.spelling}\b", text, re.MULTILINE), key.spelling
    assert max(len(line) for line in text.splitlines()) <= 200


def test_the_template_loads_when_everything_in_it_is_switched_on(tmp_path: Path) -> None:
    from edgeopt.datasets import load_preprocessing

    settings = re.compile(r"^# (?=\[preprocessing\]$|\[\[step\]\]$|[a-z0-9-]+ = )", re.MULTILINE)
    text = template()
    on = settings.sub("", text)
    assert len(settings.findall(text)) == len(KEYS) + 6 + 6  # the tables have keys of their own
    config = load_config(write(tmp_path, on), {})
    assert [type(step).__name__ for step in config.step] == ["Prune", "Qat"]
    assert config.num_calibration_samples == 128
    assert config.max_accuracy_drop == pytest.approx(0.005)
    assert config.preprocessing is not None
    assert load_preprocessing(config.preprocessing).kind == "image"


def test_the_recipe_names_are_those_of_the_passes_in_their_order() -> None:
    from edgeopt.compression import PASSES

    assert tuple(PASSES) == PASS_NAMES


def test_a_recipe_is_put_in_order_and_may_be_one_text() -> None:
    config = config_of({"recipe": ["correct-bias, equalize", "fold-batch-norm"]})
    assert config.recipe == ("fold-batch-norm", "equalize", "correct-bias")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [(["auto", "equalize"], "auto and none stand alone"), (["equalise"], "did you mean 'equalize'")],
)
def test_a_bad_recipe_is_refused(recipe: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of({"recipe": recipe})
