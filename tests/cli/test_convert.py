"""The command line as a person and a script use it."""

import ast
import inspect as python_inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from command_line import document, failed, good, run
from safetensors.torch import save_file
from timm.models import save_for_hf
from typer.testing import CliRunner  # noqa: TID251

from armour_surgery import SurgeryPlan, __version__, load
from armour_surgery.benchmarking import speed
from armour_surgery.cli import app
from armour_surgery.modes import MODES
from armour_surgery.paper import reproduction as measured
from armour_surgery.saving import folder
from armour_surgery.saving.folder import read_plan

ARGUMENTS: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 5,
}
COMMANDS = ("inspect", "convert", "finetune", "eval", "bench", "recipes", "redundancy", "paper", "demo")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models of timm (`tiny`) and transformers (`hf`), and checkpoint files."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **ARGUMENTS)
    save_for_hf(model, str(root / "tiny"), model_args=ARGUMENTS, safe_serialization=True)
    levit = {
        "img_size": 64,
        "embed_dim": (24, 36),
        "key_dim": 8,
        "depth": (1, 1),
        "num_heads": (3, 5),
        "attn_ratio": 2.0,
    }
    save_for_hf(
        timm.create_model("levit_128s", **levit), str(root / "levit"), model_args=levit, safe_serialization=True
    )
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=56, image_size=32, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(root / "hf")
    weights = {key: tensor + 1 for key, tensor in model.state_dict().items()}
    save_file(weights, root / "weights.safetensors")
    torch.save({"model": weights, "epoch": 3}, root / "weights.pth")
    save_file({**weights, "head.weight": torch.zeros(7, 48), "head.bias": torch.zeros(7)}, root / "seven.safetensors")
    return root


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh folder to work in, as a user's shell is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ARMOUR_DEBUG", raising=False)
    return tmp_path


@pytest.fixture
def tiny(models: Path, here: Path) -> str:
    (here / "tiny").symlink_to(models / "tiny")
    return "local-dir:tiny"


def bad(*arguments: str, code: int = 1) -> str:
    """The message of a command that fails: one line on stderr, nothing on stdout, and nothing written."""
    before = sorted(os.listdir())
    result = failed(*arguments, code=code)
    assert result.stdout == ""
    assert sorted(os.listdir()) == before
    return result.stderr.rstrip("\n")


# Help


def test_the_command_line_loads_without_the_heavy_libraries() -> None:
    heavy = "{'torch', 'timm', 'transformers', 'torchvision', 'numpy', 'safetensors', 'huggingface_hub', 'matplotlib'}"
    code = f"import sys, armour_surgery.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_lists_every_command() -> None:
    result = good("--help")
    assert result.stderr == ""
    assert [command for command in COMMANDS if re.search(rf"^  {command} ", result.stdout, re.MULTILINE)] == [*COMMANDS]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (
            "inspect",
            ["--checkpoint", "--pretrained", "--no-pretrained", "--img-size", "--num-classes", "--in-chans", "--json"],
        ),
        (
            "convert",
            ["--mode", "--init", "--include", "--exclude", "--checkpoint", "--no-pretrained", "--img-size",
             "--num-classes", "--in-chans", "--out", "--dry-run", "--json"],
        ),
        ("redundancy", ["--out", "--layer", "--threshold", "--checkpoint", "--no-pretrained", "--img-size", "--json"]),
        ("paper", ["--no-speed", "--budget", "--markdown", "--json"]),
        ("demo", ["--json"]),
    ],
)  # fmt: skip
def test_help_of_every_command(command: str, options: list[str]) -> None:
    text = good(command, "--help").stdout
    assert f"Usage: armour-surgery {command}" in text or f"{command} [OPTIONS]" in text
    assert [option for option in options if option not in text] == []
    flat = " ".join(text.split())
    if command in ("inspect", "convert", "redundancy"):
        for form in ("timm:NAME", "hf-hub:ORG/NAME", "local-dir:DIR", "hf:ID_OR_DIR", "torchvision:NAME"):
            assert form in flat
    if command == "convert":
        assert all(mode in flat for mode in MODES)
        assert "NAME-armour-MODE" in flat


def test_version_and_no_command() -> None:
    assert good("--version").stdout.strip() == __version__
    result = run()
    assert result.exit_code == 2
    assert "Commands" in result.stdout + result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--bogus"],
        ["operate"],
        ["convert"],
        ["inspect"],
        ["convert", "vit_tiny_patch16_224", "--bogus"],
        ["convert", "vit_tiny_patch16_224", "--img-size", "big"],
        ["convert", "vit_tiny_patch16_224", "extra"],
        ["convert", "vit_tiny_patch16_224", "--out"],
        ["paper", "deit"],
    ],
    ids=" ".join,
)
def test_wrong_flags_are_wrong_usage(arguments: list[str], here: Path) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "rror: " in result.stderr
    assert result.stdout == ""
    assert os.listdir(here) == []


# inspect


def test_inspect_shows_sites_to_a_person(tiny: str, here: Path) -> None:
    result = good("inspect", tiny)
    assert result.stderr == ""
    assert "2 attention sites in a VisionTransformer" in result.stdout
    assert "blocks.0-1.attn" in result.stdout
    assert "12 x 12" in result.stdout
    assert "qv, qk, qk-diag, kv" in " ".join(result.stdout.split())
    assert "not concat-half, concat-full" in result.stdout
    assert f"Next: armour-surgery convert {tiny}" in result.stdout
    assert os.listdir(here) == ["tiny"]


def test_inspect_json(tiny: str) -> None:
    found = document("inspect", tiny)
    assert set(found) >= {"model", "sites"}
    assert found["model"] == tiny
    for site in found["sites"]:
        assert set(site) >= {"fqn", "kind", "num_heads", "key_dim", "value_dim", "modes", "refused"}
        assert set(site["modes"]) | set(site["refused"]) == set(MODES)
    assert [site["fqn"] for site in found["sites"]] == ["blocks.0.attn", "blocks.1.attn"]


def test_inspect_of_other_libraries(models: Path, here: Path) -> None:
    found = document("inspect", f"hf:{models / 'hf'}")
    assert [site["num_heads"] for site in found["sites"]] == [4, 4]
    assert document("inspect", str(models / "hf"))["sites"] == found["sites"]
    levit = good("inspect", str(models / "levit")).stdout
    assert "downsampling" in levit
    assert "the paper leaves these blocks alone too" in " ".join(levit.split())


# convert

CONVERT_KEYS = {
    "model", "mode", "init", "out", "params_before", "params_after", "macs_before", "macs_after", "sites", "refused",
    "fidelity",
    "frontier",
    "max_loss",
    "seconds",
}  # fmt: skip


def test_convert_tells_a_person_what_was_done(tiny: str, here: Path) -> None:
    result = good("convert", tiny)
    assert result.stderr == ""
    text = " ".join(result.stdout.split())
    assert "2 of 2 attention sites converted" in text
    assert "blocks.0-1.attn (qv)" in text
    assert "MACs per image" in text
    assert "Saved to tiny-armour-qv" in text
    assert "This model needs training" in text
    assert 'load("tiny-armour-qv")' in text
    assert sorted(os.listdir(here)) == ["tiny", "tiny-armour-qv"]
    assert load(here / "tiny-armour-qv")(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


def test_convert_json(tiny: str, here: Path) -> None:
    found = document("convert", tiny, "--mode", "kv", "--exclude", "blocks.1*", "--out", "x/y")
    assert set(found) == CONVERT_KEYS
    assert (found["model"], found["mode"], found["init"], found["out"]) == (tiny, "kv", "wq", "x/y")
    assert [set(site) for site in found["sites"]] == [{"fqn", "mode", "rank", "residual"}]
    assert (found["sites"][0]["fqn"], found["sites"][0]["mode"]) == ("blocks.0.attn", "kv")
    assert found["sites"][0]["residual"] > 0
    assert found["seconds"] > 0
    surgery = load(here / "x" / "y").surgery
    assert isinstance(surgery, SurgeryPlan)
    assert (found["params_before"], found["params_after"]) == (surgery.params_before, surgery.params_after)
    assert (found["macs_before"], found["macs_after"]) == (surgery.macs_before, surgery.macs_after)


def test_convert_keeps_pretrained_weights(tiny: str, models: Path, here: Path) -> None:
    good("convert", tiny, "--out", "out")
    original = timm.create_model(f"local-dir:{models / 'tiny'}", pretrained=True).state_dict()
    kept = load(here / "out").state_dict()
    assert all(torch.equal(kept[key], original[key]) for key in kept if "qkv" not in key)


def test_refused_sites_are_told(models: Path, here: Path) -> None:
    levit = str(models / "levit")
    found = document("convert", levit, "--dry-run")
    assert found["refused"]
    assert all(set(entry) == {"fqn", "reason"} and "downsampling" in entry["reason"] for entry in found["refused"])
    assert {site["mode"] for site in found["sites"]} == {"concat-half"}
    text = " ".join(good("convert", levit, "--dry-run").stdout.split())
    assert "left alone" in text
    assert "downsampling" in text


def test_dry_run_writes_nothing(tiny: str, here: Path) -> None:
    result = good("convert", tiny, "--dry-run")
    assert "would be converted" in result.stdout
    assert "Nothing was written" in result.stdout
    assert "needs training" not in result.stdout
    found = document("convert", tiny, "--dry-run", "--out", "out")
    assert set(found) == CONVERT_KEYS
    assert found["out"] is None
    assert all(site["residual"] is None for site in found["sites"])
    assert os.listdir(here) == ["tiny"]
    real = document("convert", tiny, "--out", "out")
    same = CONVERT_KEYS - {"out", "seconds", "sites"}
    assert {key: found[key] for key in same} == {key: real[key] for key in same}


@pytest.mark.parametrize(
    ("options", "sites"),
    [
        (["--include", "blocks.1*"], ["blocks.1.attn"]),
        (["--exclude", "*.1.*"], ["blocks.0.attn"]),
        (["--include", "blocks.0", "--include", "blocks.1"], ["blocks.0.attn", "blocks.1.attn"]),
        (["--include", "*", "--exclude", "blocks.0.attn"], ["blocks.1.attn"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_include_and_exclude(options: list[str], sites: list[str], tiny: str) -> None:
    assert [site["fqn"] for site in document("convert", tiny, "--dry-run", *options)["sites"]] == sites


@pytest.mark.parametrize(
    ("model", "options", "out"),
    [
        ("tiny/", [], "tiny-armour-qv"),
        ("local-dir:./tiny", ["--mode", "qk-diag"], "tiny-armour-qk-diag"),
        ("hf:hf", [], "hf-armour-qv"),
        ("./hf/", ["--mode", "kv"], "hf-armour-kv"),
        ("timm:vit_tiny_patch16_224", ["--no-pretrained", "--img-size", "32"], "vit_tiny_patch16_224-armour-qv"),
    ],
)
def test_the_default_name(model: str, options: list[str], out: str, models: Path, tiny: str, here: Path) -> None:
    (here / "hf").symlink_to(models / "hf")
    if model == "tiny/":
        model = f"local-dir:{model}"
    assert document("convert", model, *options)["out"] == out
    assert read_plan(here / out).sites


@pytest.mark.parametrize("file", ["weights.safetensors", "weights.pth"])
def test_a_checkpoint(file: str, tiny: str, models: Path, here: Path) -> None:
    good("convert", tiny, "--checkpoint", str(models / file), "--out", "out")
    original = timm.create_model(f"local-dir:{models / 'tiny'}", pretrained=True).state_dict()
    kept = load(here / "out").state_dict()
    assert all(torch.equal(kept[key], original[key] + 1) for key in kept if "qkv" not in key)


def test_sizes(here: Path) -> None:
    sizes = ["--img-size", "32", "--num-classes", "7", "--in-chans", "1"]
    good("convert", "vit_tiny_patch16_224", "--no-pretrained", *sizes, "--include", "blocks.0*", "--out", "out")
    assert load(here / "out")(torch.zeros(1, 1, 32, 32)).shape == (1, 7)


def test_converting_again_replaces_our_folder_and_keeps_other_files(tiny: str, here: Path) -> None:
    good("convert", tiny, "--out", "out")
    (here / "out" / "notes.txt").write_text("mine")
    good("convert", tiny, "--mode", "kv", "--out", "out")
    assert read_plan(here / "out").mode == "kv"
    assert (here / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("out", ["a[b]", "a[/b]", "[bold]x", "with space", "-dash", "über"])
def test_names_with_odd_characters(out: str, tiny: str, here: Path) -> None:
    result = good("convert", tiny, f"--out={out}")
    assert read_plan(here / out).sites
    assert f"Saved to {out}" in result.stdout
    printed = re.search(r"model = load\((.+)\)", result.stdout)
    assert printed
    assert ast.literal_eval(printed[1]) == out


def test_a_long_path_is_printed_so_that_it_can_be_copied(tiny: str, here: Path) -> None:
    out = f"{'long-' * 30}name"
    assert f'load("{out}")' in good("convert", tiny, "--out", out).stdout


# Bad input


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_an_unknown_model(command: str, here: Path) -> None:
    message = bad(command, "deit_tiny_patch16_225")
    assert "deit_tiny_patch16_225" in message
    assert "did you mean" in message
    assert "deit_tiny_patch16_224" in message


@pytest.mark.parametrize(
    "model", ["nope:x", "timm:", "", " ", "./absent", "local-dir:absent", "a/b/c", "hf:./x", "[/x]"]
)
def test_names_that_are_no_model(model: str, here: Path) -> None:
    result = run("inspect", model)
    code = 2 if model.strip() in ("timm:", "") else 1
    assert bad("inspect", model, code=code)
    assert result.exit_code == code


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As without a network, whatever this machine has, and with an empty cache."""
    import huggingface_hub

    monkeypatch.setattr("armour_surgery.hosts.hub._hub_answers", lambda repo: False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / ".cache"))


@pytest.mark.parametrize("model", ["deit_tiny_patch16_224", "hf:google/vit-base-patch16-224", "hf-hub:timm/nope"])
def test_no_hub(model: str, no_hub: None, here: Path) -> None:
    message = bad("convert", model)
    assert model in message
    for way in ("--no-pretrained", "--checkpoint", "hf:DIR", "local-dir:DIR"):
        assert way in message


@pytest.mark.real
def test_the_hub_itself(here: Path) -> None:
    """Where there is no network, the real attempt ends soon and in one line."""
    started = time.monotonic()
    result = run("convert", "deit_tiny_patch16_224", "--out", "out")
    assert time.monotonic() - started < 60
    if result.exit_code:
        assert "--no-pretrained" in bad("convert", "deit_tiny_patch16_224", "--out", "out")


def test_a_convnet(here: Path) -> None:
    for command in (["inspect"], ["convert", "--no-pretrained"]):
        message = bad(command[0], "resnet18", *command[1:])
        assert "ResNet" in message
        assert "no attention" in message


def test_a_mode_that_fits_nowhere(tiny: str) -> None:
    message = bad("convert", tiny, "--mode", "concat-half")
    assert "'concat-half'" in message
    assert "use qv" in message


def test_an_unknown_mode_or_init(tiny: str) -> None:
    message = bad("convert", tiny, "--mode", "vq", code=2)
    assert "'vq'" in message
    assert all(mode in message for mode in MODES)
    message = bad("convert", tiny, "--init", "magic", code=2)
    assert "'magic'" in message
    assert "wq" in message


def test_a_mode_that_is_wrong_is_told_before_the_model_is_loaded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("armour_surgery.hosts.load_model", never)
    assert "'vq'" in bad("convert", "deit_tiny_patch16_224", "--mode", "vq", code=2)


def test_an_output_that_is_taken_is_told_before_the_model_is_loaded(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("armour_surgery.hosts.load_model", never)
    (here / "out").write_text("mine")
    assert "out" in bad("convert", "deit_tiny_patch16_224", "--out", "out")


@pytest.mark.parametrize("option", ["--include", "--exclude"])
def test_a_pattern_that_matches_nothing(option: str, tiny: str) -> None:
    message = bad("convert", tiny, option, "layers.*")
    assert "'layers.*'" in message
    assert "blocks.0.attn" in message


def test_a_model_that_is_converted_already(tiny: str, here: Path) -> None:
    good("convert", tiny, "--out", "out")
    for arguments in (["inspect", "out"], ["convert", "out"], ["convert", "./out/", "--dry-run"]):
        message = bad(*arguments)
        assert "converted already" in message
        assert tiny in message


def _is_file(path: Path) -> None:
    path.write_text("mine")


def _is_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("mine")


def _is_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [_is_file, _is_folder, _is_link], ids=lambda make: make.__name__)
@pytest.mark.parametrize("given", [True, False], ids=["given", "default"])
def test_an_output_that_is_not_ours(make: Any, given: bool, tiny: str, here: Path) -> None:
    out = here / ("out" if given else "tiny-armour-qv")
    make(out)
    message = bad("convert", tiny, *(["--out", "out"] if given else []))
    assert out.name in message
    assert "--out" in message
    if make is _is_folder:
        assert (out / "thesis.tex").read_text() == "mine"


def test_folders_that_were_edited(tiny: str, here: Path) -> None:
    good("convert", tiny, "--out", "out")
    plan = here / "out" / "surgery.json"
    whole = plan.read_text()
    for text in ("", "{", whole[: len(whole) // 2], "[]", whole.replace('"schema_version": 1', '"schema_version": 9')):
        plan.write_text(text)
        message = bad("inspect", "out")
        assert "surgery.json" in message


@pytest.mark.parametrize("file", ["weights.safetensors", "weights.pth"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_truncated_checkpoint(file: str, share: float, tiny: str, models: Path, here: Path) -> None:
    whole = (models / file).read_bytes()
    (here / file).write_bytes(whole[: int(len(whole) * share)])
    message = bad("convert", tiny, "--checkpoint", file)
    assert file in message


def test_a_checkpoint_of_another_architecture(tiny: str, models: Path, here: Path) -> None:
    message = bad("convert", tiny, "--checkpoint", str(models / "levit" / "model.safetensors"))
    assert "levit/model.safetensors" in message
    assert "missing" in message
    assert "left over" in message


def test_a_checkpoint_with_another_head_says_how_many_classes(tiny: str, models: Path, here: Path) -> None:
    message = bad("convert", tiny, "--checkpoint", str(models / "seven.safetensors"))
    assert "--num-classes" in message
    assert "7" in message


@pytest.mark.parametrize("file", ["absent.safetensors", "absent.pth", "tiny", "notes.txt"])
def test_a_checkpoint_that_is_none(file: str, tiny: str, here: Path) -> None:
    (here / "notes.txt").write_text("x")
    assert file in bad("convert", tiny, "--checkpoint", file)


class Malice:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("where", ["alone", "beside weights"])
@pytest.mark.parametrize("ending", ["pth", "bin", "ckpt"])
def test_a_pickle_is_not_executed(where: str, ending: str, tiny: str, here: Path, tmp_path_factory: Any) -> None:
    marker = tmp_path_factory.mktemp("marker") / "executed"
    malice = Malice(marker)
    torch.save(malice if where == "alone" else {"model": {"head.bias": malice}}, here / f"evil.{ending}")
    message = bad("convert", tiny, "--checkpoint", f"evil.{ending}")
    assert f"evil.{ending}" in message
    assert "not plain weights" in message
    assert not marker.exists()


def test_a_legacy_pickle_is_not_executed(tiny: str, here: Path, tmp_path_factory: Any) -> None:
    import pickle

    marker = tmp_path_factory.mktemp("marker") / "executed"
    (here / "evil.pth").write_bytes(pickle.dumps(Malice(marker)))
    assert "evil.pth" in bad("convert", tiny, "--checkpoint", "evil.pth")
    assert not marker.exists()


@pytest.mark.parametrize("option", ["--img-size", "--num-classes", "--in-chans"])
def test_sizes_that_are_none(option: str, here: Path) -> None:
    for value in ("-1", "0") if option != "--num-classes" else ("-1",):
        message = bad("convert", "vit_tiny_patch16_224", "--no-pretrained", option, value, code=2)
        assert value in message


def test_a_full_disk(tiny: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "save_file", full)
    message = bad("convert", tiny, "--out", "out")
    assert "No space left on device" in message
    assert "out" in message


# Interrupts and bugs


def test_an_interrupt_while_saving(tiny: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise KeyboardInterrupt

    good("convert", tiny, "--out", "ours")
    before = {path.name: path.read_bytes() for path in (here / "ours").iterdir()}
    monkeypatch.setattr(folder, "save_file", interrupted)
    assert "interrupted" in bad("convert", tiny, "--out", "out")
    assert "interrupted" in bad("convert", tiny, "--mode", "kv", "--out", "ours")
    assert {path.name: path.read_bytes() for path in (here / "ours").iterdir()} == before


SLOW_SAVE = """
import signal, sys, time
# A shell that starts the tests in the background has Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from armour_surgery import folder
from armour_surgery.cli import main
def slow(tensors, path, **options):
    Path(path).write_bytes(b"half")
    print("saving", flush=True)
    time.sleep(60)
folder.save_file = slow
sys.argv = ["armour-surgery", *sys.argv[1:]]
main()
"""


def test_ctrl_c_while_saving(tiny: str, here: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_SAVE, "convert", tiny, "--out", "out", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "saving\n"
        assert len(os.listdir(here)) == 2
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 1
    assert out == ""
    assert errors.splitlines() == ["error: interrupted; nothing was left half-written"]
    assert os.listdir(here) == ["tiny"]


def test_debugging_adds_the_traceback(tiny: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARMOUR_DEBUG", "1")
    result = run("convert", tiny, "--mode", "vq")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert "UsageError" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: unknown mode 'vq'")
    assert result.stdout == ""


def test_a_bug_is_one_line_too(tiny: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr("armour_surgery.surgery.conversion.find_sites", broken)
    result = run("inspect", tiny)
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ZeroDivisionError: first line second line")
    assert "ARMOUR_DEBUG=1" in line


def test_warnings_of_libraries_stay_out(tiny: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    from armour_surgery.surgery import conversion

    original = conversion.find_sites

    def warned(*args: Any, **kwargs: Any) -> Any:
        warnings.warn("noise", UserWarning, stacklevel=1)
        return original(*args, **kwargs)

    monkeypatch.setattr(conversion, "find_sites", warned)
    assert good("inspect", tiny).stderr == ""


# As a user types it


def test_the_console_script_in_a_fresh_folder(here: Path) -> None:
    script = Path(sys.executable).with_name("armour-surgery")
    assert script.exists()
    arguments = ["convert", "vit_tiny_patch16_224", "--no-pretrained", "--img-size", "64", "--json"]
    done = subprocess.run([script, *arguments], capture_output=True, text=True, cwd=here, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == CONVERT_KEYS
    assert found["out"] == "vit_tiny_patch16_224-armour-qv"
    assert sorted(os.listdir(here / found["out"])) == ["README.md", "model.safetensors", "surgery.json"]
    assert len(found["sites"]) == 12
    assert load(here / found["out"])(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
    # Nothing but what was asked for, hidden files included.
    assert os.listdir(here) == [found["out"]]


def test_python_dash_m_and_a_failure(here: Path) -> None:
    command = [sys.executable, "-m", "armour_surgery"]
    done = subprocess.run([*command, "convert", "./absent"], capture_output=True, text=True, cwd=here, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "\x1b" not in line
    assert os.listdir(here) == []


# paper and demo


@pytest.fixture(scope="module")
def paper() -> dict[str, Any]:
    """What `paper --no-speed --json` prints, for rows of every table that are quick to count.

    test_measure.py counts them all, test_paper.py times small ones.
    """
    quick = [("deit_tiny_patch16_224", ""), ("deit_tiny_patch16_224", "qv"), ("efficientnet_b0", "")]
    quick += [("levit_128s", ""), ("levit_192", "")]
    rows = tuple(row for row in measured.ROWS if (row.model, row.mode) in quick)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured, "ROWS", rows)
        found = document("paper", "--no-speed")
    assert sum(len(table["rows"]) for table in found["tables"]) == len(rows)
    return found


def test_paper_json_counts_rows(paper: dict[str, Any]) -> None:
    assert [table["table"] for table in paper["tables"]] == [1, 2, 3, 4]
    assert all(table["caption"] and table["rows"] for table in paper["tables"])
    rows = [row for table in paper["tables"] for row in table["rows"]]
    assert all(row["params"] > 0 and row["macs"] > 0 for row in rows)
    tiny = {row["mode"]: row["params"] for row in rows if row["model"] == "deit_tiny_patch16_224"}
    assert (tiny[""], tiny["qv"]) == (5_717_416, 5_272_744)
    cells = [cell for row in rows for cell in row["cells"].values()]
    assert {cell["status"] for cell in cells} <= {"same", "explained", "differs", "paper"}
    assert all(cell["note"] for cell in cells if cell["status"] in ("explained", "differs"))
    assert any(row["model"] == "efficientnet_b0" for row in rows)


def test_paper_for_a_person(paper: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tuple(
        measured.ReproducedRow(
            table=table["table"],
            **{key: value for key, value in row.items() if key != "cells"},
            cells=tuple(measured.Cell(column=column, **cell) for column, cell in row["cells"].items()),
        )
        for table in paper["tables"]
        for row in table["rows"]
    )
    monkeypatch.setattr(measured, "regenerate", lambda progress, **_: measured.Reproduction(rows))
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["paper", "--no-speed"])
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert result.stderr == ""
    for number in range(1, 5):
        assert f"Table {number}." in result.stdout
    assert "5,272,744" in result.stdout
    assert "5,717,416" in result.stdout
    assert "it was not run here" in " ".join(result.stdout.split())
    assert "deit_tiny_qv_300ep" in result.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    pytest.importorskip("sklearn")
    out = tmp_path_factory.mktemp("demo")
    compare, kept = speed.compare, list[bool]()
    with pytest.MonkeyPatch.context() as patch:
        # Everything as it is, but for the patience of the timing; and this process goes on after it.
        patch.setattr(speed, "compare", lambda *models, **_: compare(*models, rounds=4, budget_s=4))
        patch.setattr(speed, "keep_memory", lambda: kept.append(True))
        result = CliRunner().invoke(app, ["demo", "--json", "--out", str(out)])
    assert result.exit_code == 0, result.stderr
    assert kept == [True]
    return json.loads(result.stdout), result.stderr, out


def test_a_folder_that_demo_cannot_make_is_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    error = failed("demo", "--out", str(tmp_path / "taken" / "out")).stderr
    assert "cannot be made: Not a directory; name another --out" in " ".join(error.split())


def test_demo_tells_the_truth(demo: tuple[dict[str, Any], str, Path]) -> None:
    found, _, _ = demo
    assert set(found) >= {"original", "modes", "environment"}
    assert found["original"]["accuracy"] > 95
    assert set(found["modes"]) == {"qv", "kv", "qk", "qk-diag"}
    for mode in found["modes"].values():
        assert mode["accuracy_reloaded"] == mode["accuracy"]
        assert mode["params"] < found["original"]["params"]
        assert mode["macs"] < found["original"]["macs"]
        low, high = mode["speedup_iqr"]
        assert 0 < low <= mode["speedup"] <= high
        assert {"wq", "calibrated"} <= set(mode["inits"])
        assert all(init["accuracy"] == init["accuracy_reloaded"] for init in mode["inits"].values())
        assert mode["inits"]["wq"] == {key: mode[key] for key in ("accuracy", "accuracy_reloaded")}
        assert mode["accuracy"] < found["original"]["accuracy"] - 10
    assert set(found["modes"]["qv"]["inits"]) == {"wq", "wq-refit", "joint-svd", "calibrated"}
    # Without any training.
    for mode in ("qv", "kv"):
        assert found["modes"][mode]["inits"]["calibrated"]["accuracy"] > found["original"]["accuracy"] - 1
    recovered = found["recovered"]
    assert recovered["steps"] > 0
    assert recovered["accuracy"] > found["original"]["accuracy"] - 1.5
    assert recovered["accuracy"] > found["modes"]["qv"]["accuracy"] + 50


def test_demo_for_a_person(demo: tuple[dict[str, Any], str, Path]) -> None:
    found, told, out = demo
    for chapter in (
        "1. inspect",
        "2. convert and evaluate",
        "3. save, and load in a new process",
        "4. time",
        "5. recover without labels",
    ):
        assert chapter in told
    assert "…" not in told, "a table does not fit into 80 columns"
    assert "the same accuracy, every one" in told
    assert f"{found['original']['accuracy']:.1f} %" in told
    told = " ".join(told.split())
    assert "without training costs nearly all accuracy" in told
    calibrated = found["modes"]["qv"]["inits"]["calibrated"]["accuracy"]
    assert f"qv gets {calibrated:.1f} % where the original gets {found['original']['accuracy']:.1f} %" in told
    endings = {"wq": "", "wq-refit": "-wq-refit", "joint-svd": "-joint-svd", "calibrated": "-calibrated"}
    folders = [
        f"digits_vit-armour-{mode}{endings[init]}" for mode in found["modes"] for init in found["modes"][mode]["inits"]
    ]
    assert len(folders) == 10
    assert sorted(os.listdir(out)) == sorted([*folders, "digits_vit-armour-qv-recovered"])


def test_what_the_demo_leaves_can_be_trained_as_the_recipe_says(
    demo: tuple[dict[str, Any], str, Path], tmp_path: Path
) -> None:
    student = str(demo[2] / "digits_vit-armour-qv")
    few = ["--set", "data.images_per_epoch=64", "--set", "schedule.epochs=1"]
    result = run("finetune", student, "--recipe", "digits_recover", "--out", str(tmp_path / "out"), *few)
    assert result.exit_code == 0, result.stderr
    assert load(tmp_path / "out").surgery.source.name == "digits_vit"


def test_demo_numbers_are_measured_again(demo: tuple[dict[str, Any], str, Path]) -> None:
    from armour_surgery.demo.digits_vit import accuracy, load_digits_vit
    from armour_surgery.images.digits import digits_split

    found, _, out = demo
    _, _, images, labels = digits_split()
    assert accuracy(load_digits_vit(), images, labels) == found["original"]["accuracy"]
    assert accuracy(load(out / "digits_vit-armour-qv"), images, labels) == found["modes"]["qv"]["accuracy"]
    recovered = load(out / "digits_vit-armour-qv-recovered")
    assert accuracy(recovered, images, labels) == found["recovered"]["accuracy"]
    calibrated = load(out / "digits_vit-armour-kv-calibrated")
    assert accuracy(calibrated, images, labels) == found["modes"]["kv"]["inits"]["calibrated"]["accuracy"]


def test_every_command_has_a_docstring_and_metavars() -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        assert python_inspect.getdoc(command.callback)
    commands = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert commands | {group.name for group in app.registered_groups} == set(COMMANDS)
