"""The command line: what it prints, what it writes, what it refuses and with which exit code."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
import types

import pytest
import torch
import transformers
from command_line import NO_MINILM, refused, run
from processes import fork

import forwardpass as fp
from forwardpass.cli import comparison, console, embedding, source

pytestmark = pytest.mark.usefixtures("fewer_texts")
needs_minilm = pytest.mark.skipif(NO_MINILM, reason="the extra demo is not installed")


class Report:
    unpadding = "encoder.layer runs without it"

    def to_json(self):
        return {
            "swapped": [{"fqn": "a"}],
            "attention": [{"fqn": "b"}],
            "skipped": [{"fqn": "b", "code": "too_small", "text": "it is small", "fix": ""}],
            "other_layers": [],
            "unpadding": {"encoders": [], "reason": None},
            "kv_cache": None,
            "warnings": ["mind the gap"],
            "weight_bytes": {"before": 4, "after": 1, "originals": 4},
        }


@pytest.fixture
def stub_swap(monkeypatch):
    """fp.swap that multiplies weights by the factor it is told, and remembers its arguments."""
    seen = {}

    def swap(model, config, **kwargs):
        seen.update(vars(config))
        with torch.no_grad():
            for layer in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
                layer.weight.mul_(seen.get("factor", 1.0))
        return Report()

    monkeypatch.setattr(fp, "swap", swap)
    return seen


def test_version():
    assert run("--version").stdout == f"forwardpass {fp.__version__}\n"


@pytest.mark.every(3)
def test_swap_plan_and_save(folder, tmp_path):
    args = ("swap", folder, "--calibrate", "none", "--batch", 2, "--length", 16, "--min-cosine", 0.99, "--json", "-")
    done = run(*args, "--precision", "int8", "--save", tmp_path / "saved")
    assert done.exit_code == 0, done.output
    written = json.loads(done.stdout)
    assert len(written["swapped"]) == 13
    assert written["weight_bytes"]["after"] < written["weight_bytes"]["before"]
    assert 0.99 < written["parity"]["cosine_min"] < 1
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(folder)
    plan = tmp_path / "plan.json"
    swapped = fp.swap(model, precision="int8", exclude="pooler.dense")
    swapped.save_plan(plan)
    replayed = run(*args, "--plan", plan)
    assert replayed.exit_code == 0, replayed.output
    written = json.loads(replayed.stdout)
    assert len(written["swapped"]) == 12
    layers = [s["fqn"] for s in written["skipped"] if not s["fqn"].endswith("attention.self")]
    assert layers == ["pooler.dense"]
    assert [x["fqn"] for x in written["attention"]] == [x.fqn for x in swapped.attention]
    assert any((tmp_path / "saved").iterdir())


@pytest.mark.every(2)
def test_attention_in_8_bits(folder, tmp_path):
    args = ("swap", folder, "--calibrate", "none", "--batch", 2, "--length", 16, "--min-cosine", 0.99)
    done = run(
        *args, "--attention", "INT8", "--crossover", 0, "--json", tmp_path / "swap.json", "--save", tmp_path / "saved"
    )
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "swap.json").read_text())
    assert {x["bits"] for x in written["attention"]} == {"int8"} and len(written["attention"]) == 2
    printed = " ".join(done.stdout.split())
    assert "2 modules swapped, int8; calls with fewer rows or keys" in printed
    record = json.loads((tmp_path / "saved" / "forwardpass.json").read_text())
    assert [x["crossover"] for x in record["attention_8bit"]] == [0, 0]
    for options, words in [
        (("--attention", "int4"), "--attention is one of true, false, auto, int8"),
        (("--crossover", 5), "crossover=5 is for attention in 8 bits"),
        (("--attention", "int8", "--crossover", -1), "--crossover is a number of 0 or more"),
    ]:
        refused(run(*args, *options), words)


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    """A folder that `swap --save` wrote."""
    made = tmp_path_factory.mktemp("saved")
    done = run("swap", folder, "--precision", "w8a16", "--batch", 1, "--length", 8, "--min-cosine", 0.9, "--save", made)
    assert done.exit_code == 0, done.output
    return made


@pytest.mark.every(3)
def test_a_saved_folder_is_usable_on_its_own(folder, saved, tmp_path):
    model, tokenizer = embedding.load(embedding.find_model(str(saved)))
    assert {type(m).__name__ for m in model.encoder.layer[0].output.modules()} >= {"W8A16Linear"}
    original, same = embedding.load(embedding.find_model(str(folder)))
    assert tokenizer.get_vocab() == same.get_vocab()
    (got,), (expected,) = (
        embedding.embed(embedding.hidden_states(m), embedding.tokenize(tokenizer, ["some text"], m))
        for m in (model, original)
    )
    assert torch.cosine_similarity(got, expected, dim=0) > 0.99
    done = run("profile", saved, "--batch", 1, "--length", 8, "--batches", 1, "--rounds", 1)
    assert done.exit_code == 0 and "W8A16Linear" in done.stdout, done.output
    done = run("size-batch", saved, "--slo-ms", 60_000, "--rate", 5, "--length", 8, "--max-batch", 1, "--seconds", 0.1,
               "--check", 0)  # fmt: skip
    assert done.exit_code == 0, done.output
    for args in (
        ("swap", saved, "--precision", "int8"),
        ("parity", saved, "--precision", "int8"),
        ("plan", saved, "--min-cosine", 0.9),
        ("size-batch", saved, "--slo-ms", 50, "--rate", 5, "--precision", "int8"),
    ):
        refused(run(*args), "holds a model that is swapped already")
    bare = shutil.copytree(saved, tmp_path / "bare", ignore=shutil.ignore_patterns("token*", "vocab*", "special*"))
    refused(run("profile", bare), "there is no tokenizer beside the model")


def test_save_does_not_touch_a_models_own_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "load", lambda *a: pytest.fail("refused after the work, not before"))
    source = shutil.copytree(folder, tmp_path / "model")
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    (tmp_path / "link").symlink_to(source)
    swap = ("swap", source, "--precision", "int8")
    for path in (source, tmp_path / "link", tmp_path / "x" / ".." / "model"):
        for overwrite in ((), ("--overwrite",)):
            refused(run(*swap, "--save", path, *overwrite), "folder")
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    refused(run(*swap, "--save", other), "pass overwrite=True (--overwrite)")
    refused(run(*swap, "--save", other / "mine.txt"), "is no folder")
    refused(run(*swap, "--save", tmp_path / "x", "--json", tmp_path / "x"), "a path of its own")
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before


@pytest.mark.every(2)
def test_a_precision_without_a_kernel_here_is_asked_for(folder, stub_swap, tmp_path, monkeypatch):
    refused(
        run("swap", folder, "--precision", "fp8"),
        "fp8 has no kernel for a CPU, and by plain torch it is many times slower",
    )
    refused(run("parity", folder, "--precision", "fp8"), "--yes to run it all the same")
    refused(
        run("size-batch", folder, "--slo-ms", 50, "--rate", 5, "--precision", "fp8"), "--yes to run it all the same"
    )
    done = run("swap", folder, "--precision", "FP8", "--yes", "--batch", 1, "--length", 8)
    assert done.exit_code == 0 and stub_swap["precision"] == "fp8", done.output


def test_a_precision_and_a_device_may_be_in_capitals(folder, stub_swap):
    done = run("swap", folder, "--precision", "W8A16", "--device", "CPU", "--batch", 1, "--length", 8)
    assert done.exit_code == 0 and stub_swap["precision"] == "w8a16", done.output


def test_what_a_search_keeps():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 8, generator=g)
    assert embedding.search_agreement(3 * x, x) == pytest.approx({"spearman": 1, "recall_at_10": 1})
    assert embedding.search_agreement(x[:20], x[:20]) == {}
    other = embedding.search_agreement(torch.randn(40, 8, generator=g), x)
    assert abs(other["spearman"]) < 0.2 and 0.1 < other["recall_at_10"] < 0.45  # by chance ten of 39
    stats = pytest.importorskip("scipy.stats")
    near = x + torch.randn(40, 8, generator=g) / 4
    near[1] = near[2]  # equal similarities
    upper = torch.triu_indices(40, 40, 1)
    a, b = (torch.nn.functional.normalize(t.double(), dim=1) for t in (near, x))
    expected = stats.spearmanr((a @ a.T)[tuple(upper)], (b @ b.T)[tuple(upper)]).statistic
    assert embedding.search_agreement(near, x)["spearman"] == pytest.approx(expected)


@pytest.mark.every(2)
@pytest.mark.parametrize("columns", [80, 120])
def test_tables_fit_the_terminal_and_each_column_has_a_head(folder, stub_swap, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    done = run("swap", folder, "--batch", 1, "--length", 8, "--json", "-")
    lines, written = done.stderr.splitlines(), json.loads(done.stdout)
    table = [line for line in lines if not line.endswith(" …")]
    assert max(map(len, table)) <= columns
    head = next(i for i, line in enumerate(table) if line.startswith("1 x 8 tokens"))
    assert table[head - 1].split() == ["times", "lowest"]
    assert table[head].split()[3:] == ["tokens", "median", "quartiles", "as", "fast", "cosine"]
    rival = next(line for line in table if line.startswith("torch's dynamic INT8"))  # not its speed without its quality
    assert rival.split()[-1] == f"{written['torch_dynamic_int8']['cosine_min']:.5f}"
    assert written["torch_dynamic_int8"]["cosine_min"] < 1 and "torch_dynamic_int8" in written["measured"]
    search = next(i for i, line in enumerate(table) if line.startswith("search in 32 texts"))
    for key, line in (("parity", table[search + 2]), ("torch_dynamic_int8", table[search + 3])):
        expected = [written[key][name] for name in ("cosine_min", "spearman", "recall_at_10")]
        assert line.split()[-3:] == [f"{x:.5f}" for x in expected]


@pytest.mark.every(2)
def test_save_over_other_files_is_asked_for(folder, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    swap = ("swap", folder, "--precision", "w8a16", "--batch", 1, "--length", 8, "--min-cosine", 0.9)
    done = run(*swap, "--save", tmp_path, "--overwrite")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "mine.txt").read_text() == "mine" and (tmp_path / "forwardpass.json").exists()


def test_no_result_is_written_over_what_is_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "load", lambda *a: pytest.fail("refused after the work, not before"))
    file = tmp_path / "texts.txt"
    file.write_text("one\ntwo\n")
    swap = ("swap", folder, "--precision", "int8", "--text", file)
    refused(run(*swap, "--json", file), "this command reads it")
    refused(run(*swap, "--json", folder / "config.json"), "this command reads it")
    refused(run(*swap, "--json", tmp_path), "it is a folder")
    refused(
        run("profile", folder, "--json", tmp_path / "a", "--html", tmp_path / "x" / ".." / "a"), "its folder does not"
    )
    refused(run("profile", folder, "--json", tmp_path / "a", "--html", tmp_path / "a"), "a file of its own")
    refused(run("parity", folder, "--precision", "int8", "--text", file, "--plot", file), "this command reads it")
    refused(run("size-batch", folder, "--slo-ms", 50, "--trace", file, "--json", file), "this command reads it")
    assert file.read_text() == "one\ntwo\n"


def test_a_config_that_names_a_kernel_is_not_loaded(folder, tmp_path, monkeypatch):

    monkeypatch.setattr(
        transformers.modeling_utils, "lazy_import_flash_attention", lambda *a, **k: pytest.fail("fetched")
    )
    source = shutil.copytree(folder, tmp_path / "model")
    content = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**content, "attn_implementation": "kernels-community/flash-attn"}))
    refused(run("profile", source), "names the code attn_implementation='kernels-community/flash-attn'")


@pytest.mark.every(2)
@needs_minilm
@pytest.mark.parametrize(("every", "of_calibration"), [(36, 8), pytest.param(1, 1, marks=pytest.mark.slow)])
def test_minilm_int8_keeps_its_embeddings(tmp_path, every, of_calibration):
    """Of one text in so many, and calibrated on one in so many, which is most of what it costs."""
    calibration, evaluation = embedding.builtin_texts()
    (file := tmp_path / "texts.txt").write_text("\n".join(evaluation[::every]))
    (given := tmp_path / "calibration.txt").write_text("\n".join(calibration[::of_calibration]))
    calibrated = () if of_calibration == 1 else ("--calibrate", given)
    done = run("swap", "minilm", "--precision", "int8", "--batch", 1, "--length", 16, "--text", file, "--json", "-",
               *calibrated)  # fmt: skip
    assert done.exit_code == 0, done.output
    written = json.loads(done.stdout)
    assert len(written["swapped"]) >= 36 and written["parity"]["cosine_min"] >= 0.999


@pytest.mark.every(2)
def test_swap_json(folder, stub_swap, tmp_path):
    out = tmp_path / "out.json"
    result = run("swap", folder, "--precision", "int8", "--batch", 2, "--length", 16, "--json", out)
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert written["schema"] == "forwardpass.swap/1"
    assert {"versions", "device", "measured", "speedup", "swapped"} <= set(written)
    assert [set(s) for s in written["skipped"]] == [{"fqn", "code", "text", "fix"}]
    assert {"cosine_min", "relative_error"} <= set(written["parity"])
    assert written["parity"]["texts"] == 32
    assert set(written["latency_ms"]) == {"before", "after", "torch_dynamic_int8"}
    assert written["latency_ms"]["torch_dynamic_int8"] or written["reasons"]["latency_ms.torch_dynamic_int8"]
    assert written["speedup"] == pytest.approx(written["latency_ms"]["before"] / written["latency_ms"]["after"])
    assert set(written["weight_bytes"]) == {"before", "after", "originals"}
    assert str(folder) in result.stdout
    assert "too_small" in result.stdout
    assert "mind the gap" in result.stdout
    assert "encoder.layer runs without it" in result.stdout
    assert stub_swap["precision"] == "int8"
    assert sum(len(b["input_ids"]) for b in stub_swap["calibrate"]) == 64


@pytest.mark.every(2)
def test_swap_says_what_it_calibrated_on_and_how_steady_the_times_are(folder, stub_swap):
    result = run("swap", folder, "--precision", "int8", "--batch", 2, "--length", 16, "--json", "-")
    said, written = " ".join(result.stderr.split()), json.loads(result.stdout)
    assert "calibrating on 64 texts, and swapping …" in said
    assert "on 64 texts, as fp.swap(model, …, calibrate=batches) does in Python" in said
    assert written["calibration"] == {"texts": 64}
    for name, shown in (("before", "before"), ("after", "after"), ("torch_dynamic_int8", "torch's dynamic INT8")):
        low, high = written["latency_quartiles_ms"][name]
        assert f"{shown} {written['latency_ms'][name]:.1f} ms {low:.1f} to {high:.1f}" in said
    assert "1 layer to int8" in said and "attention 1 module swapped" in said
    assert max(map(len, result.stderr.splitlines())) <= 100
    result = run("swap", folder, "--precision", "w8a16", "--batch", 1, "--length", 8)
    assert "calibrat" not in result.output
    assert "calibrate=batches" in " ".join(run("swap", "--help").stdout.split())


def test_an_unchanged_model_has_no_speed_up(folder, monkeypatch):
    unchanged = Report().to_json() | {"swapped": [], "attention": []}
    monkeypatch.setattr(
        fp, "swap", lambda model, config: types.SimpleNamespace(to_json=lambda: unchanged, unpadding="", kv_cache=None)
    )
    result = run("swap", folder, "--precision", "int8", "--batch", 1, "--length", 8, "--json", "-")
    written = json.loads(result.stdout)
    assert (
        result.exit_code == 0 and written["speedup"] is None and written["reasons"]["speedup"] == "nothing was changed"
    )
    assert "nothing was changed: the model is as it was" in result.stderr
    assert not any("after" in line for line in result.stderr.splitlines() if "times as fast" in line)


def test_what_takes_long_says_so_where_there_is_no_terminal(folder, stub_swap, monkeypatch):
    monkeypatch.setattr(console, "EVERY", 0.01)
    calls = fp.swap

    def slow(model, config):
        time.sleep(0.3)
        return calls(model, config)

    monkeypatch.setattr(fp, "swap", slow)
    result = run("swap", folder, "--precision", "int8", "--batch", 1, "--length", 8)
    assert "calibrating on 64 texts, and swapping: 0 s …" in result.stderr
    assert "swapping" not in result.stdout


def test_progress_counts_and_ends(monkeypatch, capsys):
    monkeypatch.setattr(console, "EVERY", 0.01)
    with console.telling() as track:
        step = track("timing", 9)
        step(), step()
        time.sleep(0.2)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "timing …"
    assert re.fullmatch(r"timing: 2 of 9, 0 s, about [1-3] s left …", said[-1])
    time.sleep(0.05)
    assert capsys.readouterr().err == ""


def test_swap_json_to_stdout_is_alone_there(folder, stub_swap):
    result = run("swap", folder, "--precision", "w8a16", "--batch", 1, "--length", 8, "--json", "-")
    assert json.loads(result.stdout)["precision"] == "w8a16"
    assert stub_swap["calibrate"] is None
    assert str(folder) in result.stderr


def test_a_failed_check_is_1_and_says_which(folder, stub_swap):
    stub_swap["factor"] = -30.0
    args = ("swap", folder, "--precision", "int8", "--batch", 1, "--length", 8, "--calibrate", "none")
    result = run(*args)
    assert result.exit_code == 1
    assert "cosine_min >= 0.999" in result.stderr


def test_swap_reads_texts(folder, stub_swap, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("one text\n\nanother, in German: Grüße\n", encoding="utf-8")
    args = ("--text", texts, "--calibrate", texts, "--batch", 1, "--length", 8, "--json", "-")
    result = run("swap", folder, "--precision", "int8", *args)
    assert json.loads(result.stdout)["parity"]["texts"] == 2
    assert [b["input_ids"].shape[0] for b in stub_swap["calibrate"]] == [2]


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["/no/such/folder", "--precision", "int8"], "neither a folder"),
        (["../minilm", "--precision", "int8"], "neither a folder"),
        ([".", "--precision", "int8"], "config.json"),
        (["minilm", "--precision", "int8", "--plan", "x.json"], "either --precision or --plan"),
        (["minilm", "--precision", "int3"], "int8, int8_rotated, fp8, w8a16, bf16, not 'int3'"),
        (["minilm", "--plan", "missing.json"], "missing.json"),
        (["minilm", "--precision", "int8", "--text", "missing.txt"], "cannot read missing.txt: No such file"),
        (["minilm", "--precision", "int8", "--text", "/"], "cannot read /: Is a directory"),
        (["minilm", "--precision", "int8", "--calibrate", "missing.txt"], "cannot read missing.txt"),
        (["minilm", "--precision", "int8", "--json", "/no/such/folder/x.json"], "cannot write"),
        (["minilm", "--precision", "int8", "--device", "tpu"], "cpu or cuda, not 'tpu'"),
        pytest.param(["minilm", "--precision", "int8", "--length", "4096"], "4096 tokens", marks=needs_minilm),
    ],
)
def test_refusals(args, words):
    refused(run("swap", *args), words)


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["swap", "--min-cosine", "-3"], "--min-cosine is a number above 0 and at most 1, not -3.0"),
        (["swap", "--min-cosine", "0"], "--min-cosine"),
        (["swap", "--min-cosine", "1.01"], "--min-cosine"),
        (["swap", "--min-cosine", "nan"], "--min-cosine"),
        (["swap", "--batch", "0"], "--batch is a number of 1 or more, not 0"),
        (["plan", "--min-cosine", "-0.5"], "--min-cosine"),
        (["plan", "--max-error", "-1"], "--max-error is a number of 0 or more, not -1.0"),
        (["plan", "--max-error", "inf"], "--max-error"),
        (["plan", "--length", "-1"], "--length"),
        (["profile", "--rounds", "0"], "--rounds"),
        (["profile", "--batches", "0"], "--batches"),
        *(
            (["size-batch", *("--slo-ms", "50", "--rate", "5"), option, value], f"{option} is a number")
            for option, values in {
                "--slo-ms": "0 -1 nan inf",
                "--rate": "0 -1 nan inf",
                "--percentile": "0 100 -1 nan",
                "--seconds": "0 -1 nan inf",
                "--check": "-1 nan inf",
                "--price-per-hour": "-1 nan inf",
                "--max-batch": "0",
                "--memory-limit-mb": "0",
            }.items()
            for value in values.split()
        ),
        (["size-batch", "--slo-ms", "50"], "pass either --rate or --trace: neither was given"),
        (["size-batch", "--slo-ms", "50", "--rate", "5", "--trace", "x"], "either --rate or --trace: both were given"),
    ],
)
def test_numbers_out_of_bounds_are_refused(args, words):
    command, *options = args
    refused(run(command, "minilm", *options), words)


def test_refuses_text_that_is_not_utf8_or_empty_or_too_long(folder, tmp_path):
    file = tmp_path / "texts.txt"
    for content, words in (
        (b"caf\xe9", "not UTF-8 at byte 3"),
        (b"\n \n", "has no text"),
        (b"long " * 600, "602 tokens"),
    ):
        file.write_bytes(content)
        refused(run("swap", folder, "--precision", "int8", "--text", file), words)


def test_refuses_what_swap_refuses(folder, monkeypatch):
    def swap(model, config):
        raise ValueError("the plan is for\nanother model")

    monkeypatch.setattr(fp, "swap", swap)
    refused(run("swap", folder, "--precision", "int8"), "the plan is for another model")


def test_refuses_a_broken_or_wrong_model(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\xff" * 100)
    refused(run("swap", broken, "--precision", "int8"), "cannot load")
    (broken / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    refused(run("swap", broken, "--precision", "int8"), "encoder-decoder")


@needs_minilm
def test_refuses_a_minilm_that_is_another(monkeypatch):
    monkeypatch.setitem(source.PACKAGED, "minilm", dataclasses.replace(source.PACKAGED["minilm"], sha256="0" * 64))
    refused(run("swap", "minilm", "--precision", "int8"), "is not all-MiniLM-L6-v2")


@needs_minilm
def test_minilm_is_found_without_importing_its_package():
    assert embedding.find_model("minilm").origin.startswith("all-MiniLM-L6-v2")
    assert source.PACKAGED["minilm"].package.replace("-", "_") not in sys.modules


def test_torch_dynamic_int8_says_why_it_is_missing(monkeypatch):
    quantized, reason = comparison.torch_dynamic_int8(torch.nn.Sequential(torch.nn.Linear(8, 8)))
    assert (quantized is None) != (reason is None)
    monkeypatch.setitem(sys.modules, "torch.ao.quantization", None)
    assert "quantize_dynamic" in comparison.torch_dynamic_int8(torch.nn.Linear(8, 8))[1]


@pytest.mark.every(3)
def test_without_the_extra_it_prints_the_pip_line():
    code = (
        "import sys; sys.modules['typer'] = None\n"
        "from forwardpass.__main__ import main; sys.argv = ['forwardpass', 'doctor']; main()"
    )
    done = fork.run(code)
    assert (done.returncode, done.stdout) == (2, "")
    needed = "pip install 'typer>=0.12' 'rich>=13' 'matplotlib>=3.8'"
    assert done.stderr == f"forwardpass: the command line needs typer: {needed}\n"


@pytest.mark.every(3)
def test_the_command_itself():
    done = subprocess.run([sys.executable, "-m", "forwardpass", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"forwardpass {fp.__version__}\n"), done.stderr
    done = run("swap", "minilm", "--batch", "x")
    assert done.exit_code == 2 and isinstance(done.exception, SystemExit)


@pytest.mark.every(2)
def test_profile_prints_the_phases_and_writes_json_page_and_trace(folder, tmp_path):
    files = {name: tmp_path / f"p.{name}" for name in ("json", "html", "trace")}
    result = run("profile", folder, "--batch", 2, "--length", 16, "--batches", 2, "--rounds", 1,
                 *(part for name, file in files.items() for part in (f"--{name}", file)))  # fmt: skip
    assert result.exit_code == 0, result.output
    for words in (
        "input",
        "transfer",
        "forward",
        "output",
        "nothing is transferred",
        "\nLinear",
        "fp.Pipeline, modelled",
    ):
        assert words in result.stdout
    written = json.loads(files["json"].read_text())
    assert list(written["phases"]) == ["input", "transfer", "forward", "output"]
    assert (written["schema"], written["batch"], written["length"]) == ("forwardpass.profile/1", 2, 16)
    assert written["model"]["origin"].startswith("the folder ")
    assert abs(written["unaccounted"]) < 0.05
    assert written["phases"]["forward"]["share"] > written["phases"]["output"]["share"] > 0
    assert "<svg" in files["html"].read_text(encoding="utf-8")
    assert "traceEvents" in json.loads(files["trace"].read_text())


def test_profile_json_on_stdout_is_alone(folder):
    result = run("profile", folder, "--batch", 1, "--length", 8, "--batches", 1, "--rounds", 1, "--json", "-")
    assert result.exit_code == 0, result.output
    assert "phases" in json.loads(result.stdout)


def test_profile_refuses(folder, tmp_path):
    refused(run("profile", folder, "--length", 9999), "a length of 9999 tokens is more than the model's 512")
    refused(run("profile", folder, "--html", tmp_path / "none" / "p.html"), "its folder does not exist")
    refused(run("profile", folder, "--device", "tpu"), "--device is cpu or cuda, not 'tpu'")
    refused(run("profile", tmp_path), "without a config.json")


@pytest.mark.every(2)
def test_parity_lists_layers_and_draws(folder, tmp_path):
    files = {"json": tmp_path / "parity.json", "html": tmp_path / "parity.html", "plot": tmp_path / "parity.png"}
    result = run("parity", folder, "--precision", "int8", *(x for n, f in files.items() for x in (f"--{n}", f)))
    assert result.exit_code == 0, result.output
    assert "layer, worst first" in result.stdout and "as embedding: samples 32" in result.stdout
    written = json.loads(files["json"].read_text())
    assert written["schema"] == "forwardpass.parity/1" and written["agreement"]["samples"] == 32
    assert written["precision"] == "int8" and written["layers"]
    assert files["html"].read_text().count("<tr>") == 1 + len(written["layers"])
    assert files["plot"].read_bytes()[:4] == b"\x89PNG"
    refused(run("parity", folder, "--precision", "int8", "--plan", "x"), "pass either --precision or --plan")
    refused(run("parity", folder, "--precision", "int9"), "--precision is one of")
    refused(run("parity", folder, "--precision", "int8", "--plot", tmp_path / "parity.txt"), "give it another name")
