import gc
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from runs import project
from typer.testing import CliRunner

from tightfit.cli import app
from tightfit.core.memory import live_bytes


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return project(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def recipe(made, tmp_path):
    """A recipe file of its own, writing into tmp_path."""
    path = tmp_path / "recipe.yaml"
    path.write_text((made / "recipe.yaml").read_text().replace(f"{made}/run", f"{tmp_path}/run"))
    return path


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(*arguments, code=2):
    """The one line on standard error of a command that must fail without a traceback."""
    result = run(*arguments)
    assert result.exit_code == code, result.output + result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("USDT", "note:", "step "))]
    assert len(lines) == 1 and lines[0].startswith("tightfit: "), result.stderr
    assert "Traceback" not in result.output
    return lines[0]


def test_help_names_every_command():
    result = run("--help")
    assert result.exit_code == 0
    for command in ("demo", "methods", "plan", "train", "compare", "measure", "export", "report"):
        assert command in result.output
        assert run(command, "--help").exit_code == 0


def test_methods():
    facts = {f["name"]: f for f in json.loads(run("methods", "--json").stdout)}
    assert facts["lora"]["class"] == "Lora" and facts["partial-embedding"]["exact"] is True
    assert "PartialEmbedding" in run("methods").stdout


def test_train_then_export_and_report(recipe, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    result = run("train", recipe, "train.epochs=1", "methods=[{Lora: {rank: 2}}]")
    assert result.exit_code == 0, result.stderr
    assert "accuracy" in result.stdout and "tightfit export" in result.stdout
    folder = tmp_path / "run"
    names = {p.name for p in folder.iterdir()}
    assert names >= {"recipe.yaml", "metrics.jsonl", "checkpoints", "recipe.json", "tightfit.safetensors"}
    assert names >= {"README.md", "report.html"}
    exported = run("export", folder, tmp_path / "out")
    assert exported.exit_code == 0, exported.stderr
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and model.config.num_labels == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("good film")["input_ids"]
    (folder / "report.html").unlink()
    assert run("report", folder).exit_code == 0
    assert "not an empty folder" in refused("export", folder, tmp_path / "out")
    inside = folder / "README.md" / "out"
    assert f"{inside}: could not be written" in refused("export", folder, inside)
    for size in ("many", "0", "-5GB"):
        assert f"max_shard_size: got '{size}'" in refused(
            "export", folder, tmp_path / "more", f"--max-shard-size={size}"
        )


def test_plan_and_measure_agree(recipe):
    planned = json.loads(run("plan", recipe, "--json", "--budget", "1GiB").stdout)
    gc.collect()
    others = live_bytes()  # tensors that other tests of this process keep
    measured = json.loads(run("measure", recipe, "--json").stdout)
    assert planned["fits"] is True and planned["conflicts"] == []
    assert planned["peak_bytes"] == measured["predicted_peak_bytes"]
    assert abs((measured["peak_bytes"] - others) / planned["peak_bytes"] - 1) < 0.05
    assert planned["trainable_parameters"] == measured["trainable_parameters"]
    assert "predicted peak" in run("plan", recipe).stdout


def test_plan_over_budget(recipe):
    assert "over the budget of" in refused("plan", recipe, "--budget", "1KiB")
    for text in ("much", "24", "-1GiB", "1 potato"):
        assert f"budget: got '{text}'" in refused("plan", recipe, f"--budget={text}")


# Wrong input: exit 2, one line that names file, line and key


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("methods=[Loraa]", ["unknown method 'Loraa'", "did you mean 'Lora'"]),
        ("methods=[{Lora: {ranks: 8}}]", ["Lora.ranks", "unknown field", "rank"]),
        ("methods=[{Lora: {rank: -1}}]", ["rank", "-1"]),
        ("methods=[Lora, Lora]", ["Lora"]),
        ("methods=[{Velora: {groups: 99}}]", ["Velora(groups=99)", "give at most 16 groups"]),
        ("train.epoch=1", ["train.epoch", "unknown key", "epochs"]),
        ("train.epochs=many", ["train.epochs", "'many'"]),
        ("data.label=labels", ["labels", "train.tsv", "label"]),
        ("data.train=nowhere.tsv", ["nowhere.tsv"]),
        ("model=/nowhere/model", ["/nowhere/model"]),
        ("task=parsing", ["task", "parsing"]),
        ("train", ["key=value"]),
    ],
)
@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_wrong_recipe(recipe, tmp_path, command, override, words):
    line = refused(command, recipe, override)
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["train.tsv", "empty"]),
        (b"text\tlabel\ngood\t1\nbad\t0\n", ["train.tsv", "sentence"]),
        (b"sentence\tlabel\ngood\t1\nbad\t0\tmore\n", ["train.tsv, line 3", "too many fields"]),
        (b"sentence\tlabel\ngood\t1\nb\xffd\t0\n", ["train.tsv, line 3", "UTF-8"]),
    ],
)
def test_wrong_data(recipe, tmp_path, content, words):
    (tmp_path / "train.tsv").write_bytes(content)
    line = refused("train", recipe, f"data.train={tmp_path}/train.tsv")
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_a_label_seen_only_in_eval(recipe, tmp_path):
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\ngood\t1\nbad\t2\n")
    line = refused("train", recipe, f"data.eval={tmp_path}/dev.tsv")
    assert "dev.tsv, line 3" in line and "'2'" in line


def test_an_output_folder_that_exists(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("keep me")
    assert "not empty" in refused("train", recipe)
    assert "no run folder" in refused("train", recipe, "--resume")
    assert (tmp_path / "run" / "thesis.txt").read_text() == "keep me"


def test_files_and_folders_that_are_not_there(tmp_path):
    assert "nowhere.yaml" in refused("train", tmp_path / "nowhere.yaml")
    assert "nowhere" in refused("report", tmp_path / "nowhere")
    assert "nowhere" in refused("export", tmp_path / "nowhere", tmp_path / "out")


def test_usage_errors_are_wrong_input_too(recipe):
    assert run("trian", recipe).exit_code == 2
    assert run("train").exit_code == 2
    assert run("plan", recipe, "--bugdet", "1GiB").exit_code == 2
    assert "--methods" in refused("compare", recipe, recipe, "--methods", "lora")
    assert "train.epochs=1, accepted are recipe files" in refused(
        "compare", recipe, "train.epochs=1", "--methods", "lora"
    )
    assert "unknown name 'loraa'" in refused("compare", recipe, "--methods", "loraa")
    assert "more than once" in refused("compare", recipe, "--methods", "lora,lora")


def test_debug_shows_the_traceback(recipe):
    for arguments in (("train", recipe, "train.epoch=1", "--debug"), ("--debug", "train", recipe, "train.epoch=1")):
        result = run(*arguments)
        assert result.exit_code == 2 and "Traceback" in result.stderr and "RecipeError" in result.stderr


# A failed run: exit 1


def test_a_loss_that_is_not_finite(recipe, tmp_path):
    line = refused("train", recipe, "train.learning_rate=1e30", "train.max_grad_norm=0", code=1)
    assert "step 2: the loss is nan" in line and "learning_rate" in line


def test_an_unexpected_error_is_a_failure_not_a_traceback(recipe, monkeypatch):
    monkeypatch.setattr("tightfit.train.run.train", lambda *a, **k: 1 / 0)
    assert "ZeroDivisionError" in refused("train", recipe, code=1)


# Real processes


def start(*arguments, **options):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tightfit", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_exit_code_of_a_process(recipe):
    process = start("plan", recipe, "train.epoch=1")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and out == "" and len(err.splitlines()) == 1, err


@pytest.mark.slow
def test_ctrl_c_saves_and_the_run_goes_on(recipe, tmp_path):
    process = start("train", recipe, "train.epochs=500", "train.save_every=100000")
    metrics = tmp_path / "run" / "metrics.jsonl"
    waited = time.monotonic()
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() - waited < 100:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "--resume" in err and "Traceback" not in err
    assert list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk(recipe, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    options = ["-t", "tmpfs", "-o", "size=700k"]
    if subprocess.run(["mount", *options, "tmpfs", small], capture_output=True).returncode:
        pytest.skip("this machine cannot mount a small file system")
    try:
        process = start("train", recipe, f"output={small}/run", "train.save_every=1", "train.epochs=100")
        _, err = process.communicate(timeout=300)
        assert process.returncode == 1, err
        assert f"no space left in {small}/run" in err and "Traceback" not in err
        whole = [p for p in (small / "run" / "checkpoints").glob("checkpoint-*") if (p / "complete.json").is_file()]
        assert whole
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_command_that_is_terminated_clears_away_what_it_began(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from tightfit.cli import commands\n"
        "from tightfit.cli.app import main\n"
        "from tightfit.core.artifacts import replacing_folder\n"
        "def begun(run, out, **options):\n"
        "    with replacing_folder(Path(out)) as folder:\n"
        "        (folder / 'part').write_text('half')\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        (folder / 'rest').write_text('whole')\n"
        "commands.run_export = begun\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, "export", str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 143 and done.stderr == "terminated\n", done
    assert not list(tmp_path.iterdir())


def test_no_heavy_import_before_a_command_runs():
    code = "import sys, tightfit.cli.app; print([m for m in ('transformers', 'datasets', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]"
