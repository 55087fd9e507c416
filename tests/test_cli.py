"""The command line: what each verb prints and makes, and how it fails."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import flash_llm
from flash_llm import environment
from flash_llm.cli import app
from flash_llm.kernels import choice

WORDS = [f"word{i}" for i in range(60)]
VERBS = (
    "prune",
    "retrain",
    "compress",
    "decompress",
    "generate",
    "evaluate",
    "compare",
    "inspect",
    "verify",
    "plan",
    "tune",
    "env",
)


def run(*args: object) -> Any:
    """Runs ``flash-llm ARGS``: exit_code, stdout and stderr."""
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model ``dense``, what verbs make of it (``pruned``, ``small``), and ``text.txt``."""
    home = tmp_path_factory.mktemp("cli")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", "<eos>", *WORDS])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    wrapped.chat_template = "{% for m in messages %}word1 {{ m.content }} word2 {% endfor %}"
    wrapped.save_pretrained(home / "dense")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.float16).save_pretrained(home / "dense")
    (home / "text.txt").write_text(" ".join(WORDS[i * i % 60] for i in range(2000)))
    assert run("prune", home / "dense", "--out", home / "pruned", *calibration(home)).exit_code == 0
    assert run("compress", home / "pruned", "--min-sparsity", 0, "--out", home / "small").exit_code == 0
    return home


def calibration(home: Path) -> list[object]:
    return ["--calibration", home / "text.txt", "--samples", 4, "--seqlen", 32]


def linear_zeros(folder: Path) -> list[float]:
    return [layer["sparsity"] for layer in inspect(folder)["layers"] if layer["name"] != "lm_head"]


def inspect(folder: Path) -> dict[str, Any]:
    return json.loads(run("inspect", folder, "--json").stdout)


def test_help_shows_examples_of_every_verb() -> None:
    overview = run("--help")
    assert overview.exit_code == 0
    assert "Examples:" in overview.stdout
    for verb in VERBS:
        assert verb in overview.stdout
        page = run(verb, "--help").stdout
        assert f"flash-llm {verb}" in page.partition("Examples:")[2]


def test_help_waits_for_no_heavy_import() -> None:
    code = "import sys, flash_llm.cli; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_prune_prints_the_folder_and_drops_half(home: Path, tmp_path: Path) -> None:
    result = run("prune", home / "dense", "--method", "magnitude", "--out", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'out'}\n")
    assert "14 layers" in result.stderr
    assert linear_zeros(tmp_path / "out") == pytest.approx([0.5] * 14, abs=1e-3)


def test_prune_passes_its_options_on(home: Path, tmp_path: Path) -> None:
    options = ["--sparsity", 0.25, "--seed", 3, "--skip", r"layers\.0\.", "--include-lm-head", "--dtype", "bfloat16"]
    assert run("prune", home / "dense", *calibration(home), *options, "--out", tmp_path / "out").exit_code == 0
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert record["dtype"] == "bfloat16"
    assert (record["calibration"]["samples"], record["calibration"]["seqlen"], record["calibration"]["seed"]) == (
        4,
        32,
        3,
    )
    zeros = {layer["name"]: layer["sparsity"] for layer in inspect(tmp_path / "out")["layers"]}
    assert all(share == (0 if "layers.0." in name else pytest.approx(0.25, abs=0.01)) for name, share in zeros.items())


def test_prune_compress_equals_the_two_verbs(home: Path, tmp_path: Path) -> None:
    options = ["--method", "magnitude", "--sparsity", 0.8]
    assert run("prune", home / "dense", *options, "--out", tmp_path / "pruned").exit_code == 0
    assert run("compress", tmp_path / "pruned", "--out", tmp_path / "two").exit_code == 0
    assert run("prune", home / "dense", *options, "--compress", "--out", tmp_path / "one").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "pruned", "two"]
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_prune_compress_keeps_the_pruned_model_if_compressing_fails(home: Path, tmp_path: Path) -> None:
    options = ["--method", "magnitude", "--sparsity", 0.0, "--compress"]
    result = run("prune", home / "dense", *options, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert f"flash-llm compress {tmp_path / 'out.pruned'}" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.pruned"]


def test_decompress_gives_the_pruned_weights_back(home: Path, tmp_path: Path) -> None:
    assert run("decompress", home / "small", "--out", tmp_path / "again").exit_code == 0
    first, again = (LlamaForCausalLM.from_pretrained(path) for path in (home / "pruned", tmp_path / "again"))
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))


def test_generate_streams_the_same_text_as_the_pruned_model(home: Path) -> None:
    results = [run("generate", home / name, "word3 word4", "--max-new-tokens", 8) for name in ("pruned", "small")]
    assert [result.exit_code for result in results] == [0, 0]
    assert results[0].stdout == results[1].stdout != ""
    assert "tokens/s" in results[1].stderr


def test_generate_samples_by_seed(home: Path) -> None:
    def sample(seed: int) -> str:
        return run(
            "generate", home / "small", "word3", "--temperature", 5, "--seed", seed, "--max-new-tokens", 12
        ).stdout

    assert sample(1) == sample(1) != sample(2)


def test_generate_reads_standard_input_and_chats(home: Path) -> None:
    options = ["--max-new-tokens", "5"]
    piped = CliRunner().invoke(app, ["generate", str(home / "small"), "-", *options], input="word1 word7 word2")
    chat = run("generate", home / "small", "--chat", "word7", *options)
    assert piped.exit_code == chat.exit_code == 0
    assert piped.stdout == chat.stdout


def test_evaluate_says_the_same_of_pruned_and_compressed(home: Path) -> None:
    options = ["--text", home / "text.txt", "--window", 64, "--max-windows", 3]
    results = [json.loads(run("evaluate", home / name, *options, "--json").stdout) for name in ("pruned", "small")]
    assert results[0]["perplexity"] == results[1]["perplexity"]
    assert (results[1]["windows"], results[1]["window"], results[1]["tokens"]) == (3, 64, 3 * 63)
    assert results[1]["dtype"] == "float32" if results[1]["device"] == "cpu" else "float16"
    words = run("evaluate", home / "small", *options).stdout
    assert f"perplexity {results[1]['perplexity']:.4f}" in words
    assert "3 windows of 64 tokens" in words


def test_inspect_lists_layers_and_totals(home: Path) -> None:
    info = inspect(home / "small")
    packed = [layer for layer in info["layers"] if layer["packed"]]
    assert len(packed) == 14
    assert sum(layer["nbytes"] for layer in packed) < sum(layer["dense_nbytes"] for layer in packed)
    assert info["totals"]["nbytes"] < inspect(home / "pruned")["totals"]["nbytes"]
    table = run("inspect", home / "small").stdout
    assert all(layer["name"] in table for layer in info["layers"])
    assert "48x48" in table
    assert "50.0%" in table


def test_verify_finds_a_flipped_bit(home: Path, tmp_path: Path) -> None:
    result = run("verify", home / "small")
    assert result.exit_code == 0
    damaged = copy(home / "small", tmp_path / "damaged")
    data = bytearray((damaged / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(data)
    assert_fails(run("verify", damaged), "damaged")


def test_verify_accepts_an_edit_that_was_meant(home: Path, tmp_path: Path) -> None:
    edited = copy(home / "small", tmp_path / "edited")
    config = json.loads((edited / "config.json").read_text())
    (edited / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert_fails(run("verify", edited), "config.json")
    assert run("verify", edited, "--accept-config").exit_code == 0
    assert run("verify", edited).exit_code == 0


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"{flash_llm.__version__}\n")


def test_env_describes_any_machine() -> None:
    report = json.loads(run("env", "--json").stdout)
    assert report["packages"]["torch"] == torch.__version__
    assert len(report["gpus"]) == torch.cuda.device_count()
    assert torch.__version__ in run("env").stdout


def test_env_says_which_kernel_is_asked_for(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    forget = choice.of_environment.cache_clear  # it is read once a process
    request.addfinalizer(forget)
    for value, said in (("", "auto"), ("portable", "portable"), ("fast", "can't be used: FLASH_LLM_KERNEL 'fast'")):
        monkeypatch.setenv("FLASH_LLM_KERNEL", value)
        forget()
        assert json.loads(run("env", "--json").stdout)["kernel"].startswith(said)


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def assert_fails(result: Any, words: str, code: int = 1) -> None:
    """One line of words on standard error, nothing on standard output, no traceback."""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert words in lines[0]


BAD: dict[str, tuple[Callable[[Path], list[object]], str]] = {
    "missing model": (lambda h: ["prune", h / "nothing", "--out", "OUT"], "nothing"),
    "no model": (lambda h: ["prune", h, "--method", "magnitude", "--out", "OUT"], "config.json"),
    "unknown method": (lambda h: ["prune", h / "dense", "--method", "magic", "--out", "OUT"], "wanda"),
    "sparsity": (lambda h: ["prune", h / "dense", *calibration(h), "--sparsity", 1.5, "--out", "OUT"], "1.5"),
    "no calibration": (lambda h: ["prune", h / "dense", "--out", "OUT"], "calibration"),
    "little text": (lambda h: ["prune", h / "dense", *calibration(h), "--samples", 999, "--out", "OUT"], "999"),
    "output is the model": (lambda h: ["prune", h / "dense", *calibration(h), "--out", h / "dense"], "dense"),
    "compress into a full folder": (
        lambda h: ["prune", h / "dense", *calibration(h), "--compress", "--out", h / "small"],
        "not an empty folder",
    ),
    "nothing to gain": (lambda h: ["compress", h / "dense", "--out", "OUT"], "no layer would gain by being packed"),
    "compressed twice": (lambda h: ["compress", h / "small", "--out", "OUT"], "compressed already"),
    "decompress dense": (lambda h: ["decompress", h / "dense", "--out", "OUT"], "not compressed"),
    "generate from nothing": (lambda h: ["generate", h / "nothing", "word1"], "is no folder"),
    "generate from no model": (lambda h: ["generate", h, "word1"], "no config.json"),
    "empty prompt": (lambda h: ["generate", h / "small", ""], "empty"),
    "no such device": (lambda h: ["generate", h / "small", "word1", "--device", "toaster"], "toaster"),
    "no such GPU": (lambda h: ["generate", h / "small", "word1", "--device", "cuda:99"], "cuda:99"),
    "no text": (lambda h: ["evaluate", h / "small", "--text", h / "none.txt"], "none.txt"),
    "short text": (
        lambda h: ["evaluate", h / "small", "--text", h / "dense" / "generation_config.json", "--window", 128],
        "tokens",
    ),
    "long window": (lambda h: ["evaluate", h / "small", "--text", h / "text.txt", "--window", 129], "129"),
    "inspect no model": (lambda h: ["inspect", h], "config.json"),
    "verify dense": (lambda h: ["verify", h / "dense"], "not compressed"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    case: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, words = BAD[case]
    monkeypatch.chdir(tmp_path)
    before = sorted(home.rglob("*"))
    assert_fails(run(*arguments(home)), words)
    assert list(tmp_path.iterdir()) == []
    assert sorted(home.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments",
    [["prune"], ["juggle"], ["generate", "DIR", "x", "--max-new-tokens", "0"], ["evaluate", "DIR"], ["env", "--what"]],
)
def test_usage_errors_exit_with_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [["--debug", "inspect", "nothing"], ["inspect", "nothing", "--debug"]])
def test_debug_shows_the_traceback(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_the_unexpected_is_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "environment", lambda: {}["key"])
    assert_fails(run("env"), "KeyError: 'key'")


def test_an_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(environment, "environment", interrupt)
    result = run("env")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_infinite_perplexity_is_still_json(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flash_llm import evaluate

    found = evaluate.PerplexityResult(math.inf, 1, 1, 2, 2, 0.0)
    monkeypatch.setattr(evaluate, "perplexity", lambda *_, **__: found)
    result = run("evaluate", home / "small", "--text", home / "text.txt", "--json")
    assert json.loads(result.stdout)["perplexity"] is None


def test_the_installed_program(home: Path) -> None:
    program = Path(sysconfig.get_path("scripts"), "flash-llm")
    if not program.is_file():
        pytest.skip("the package is not installed in this environment")
    done = subprocess.run([program, "inspect", home / "small"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    failed = subprocess.run([program, "inspect", home], capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")


def test_prune_takes_a_budget_or_a_sparsity(home: Path, tmp_path: Path) -> None:
    budget = int(0.7 * sum(layer["nbytes"] for layer in inspect(home / "dense")["layers"]))
    both = ["--method", "magnitude", "--sparsity", 0.5, "--budget", budget, "--out", tmp_path / "out"]
    result = run("prune", home / "dense", *both)
    assert (result.exit_code, "give one of them" in result.stderr) == (1, True)


@pytest.mark.parametrize(("values", "stored"), [("fp8", "float8_e4m3"), ("int8", "int8")])
def test_compress_rounds_to_8_bits_when_asked(home: Path, tmp_path: Path, values: str, stored: str) -> None:
    done = run("compress", home / "pruned", "--values", values, "--min-sparsity", 0, "--out", tmp_path / "small")
    assert done.exit_code == 0
    assert f"in float16 from {stored} values" in done.stderr
    packed = [layer for layer in inspect(tmp_path / "small")["layers"] if layer["packed"]]
    assert {layer["values"] for layer in packed} == {stored}
    assert stored in run("inspect", tmp_path / "small").stdout
    assert run("verify", tmp_path / "small").exit_code == 0
    words = run("evaluate", tmp_path / "small", "--text", home / "text.txt", "--window", 64, "--json").stdout
    rounded, exact = (
        json.loads(words),
        run("evaluate", home / "small", "--text", home / "text.txt", "--window", 64, "--json"),
    )
    assert rounded["perplexity"] == pytest.approx(json.loads(exact.stdout)["perplexity"], rel=0.02)
