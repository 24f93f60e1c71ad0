"""`dpoeng doctor`: each thing that can be wrong is found, and a crash of a library is a finding."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from dpoeng.cli.main import main
from dpoeng.engine.checks import probes
from dpoeng.engine.checks.driver import OLDER, too_old
from dpoeng.engine.models import quantized
from dpoeng.engine.recipes import doctor as module
from dpoeng.engine.recipes.doctor import Check, diagnose, run_probe

GPU = {"name": "A100", "capability": "8.0", "total_bytes": 80 << 30, "free_bytes": 79 << 30, "bfloat16": True}
FINE: dict[str, dict[str, Any]] = {
    "torch": {"ok": True, "version": "2.13.0", "cuda_build": "13.0", "threads": 2, "gpus": [GPU]},
    "transformers": {"ok": True},
    "bitsandbytes": {"ok": True},
    "triton": {"ok": True, "used": True},
}


def look(tmp_path: Path, **probed: dict[str, Any]) -> dict[str, Check]:
    answers = {name: {**found, **probed.get(name, {})} for name, found in FINE.items()}
    found = diagnose(tmp_path / "cache", tmp_path / "out", probe=answers.__getitem__)
    assert all(check.remedy for check in found.checks if check.status in ("warning", "error"))
    return {check.name: check for check in found.checks}


def test_the_tested_versions_are_those_of_the_root_file() -> None:
    root = Path(__file__).resolve().parents[2] / "constraints.txt"
    pins = module.tested_versions()
    assert pins["torch"] == "2.13.0"
    assert len(pins) == sum("==" in line.split("#")[0] for line in root.read_text().splitlines())


def test_all_probes_compute_here() -> None:
    """Really: on the CPU, in this process (as `doctor` does in others)."""
    assert len(probes.torch_probe()["version"]) > 2
    assert probes.bitsandbytes_probe()["device"] in ("cpu", "cuda")
    assert probes.transformers_probe()["peft"]
    assert probes.triton_probe()["used"] is torch.cuda.is_available()


def test_wrong_numbers_are_a_finding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = quantized.int8_linear
    monkeypatch.setattr(quantized, "int8_linear", lambda *arguments: real(*arguments) * 1.2)
    monkeypatch.setattr(sys, "argv", ["probes", "bitsandbytes"])
    probes.main()
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert "8bit layer on cpu: off by" in found["problem"]


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11"),
        ("import sys; sys.stderr.write('libcudart is missing'); sys.exit(3)", "exit status 3: libcudart is missing"),
        ("import time; time.sleep(60)", "no answer within 1 s"),
    ],
)
def test_a_crash_of_a_library_is_a_finding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, words: str
) -> None:
    real = subprocess.run

    def run(command: list[str], **settings: Any) -> Any:
        return real([sys.executable, "-c", program], **settings)

    monkeypatch.setattr(module.subprocess, "run", run)
    found = run_probe("bitsandbytes", limit_s=1 if "sleep" in program else 60)
    assert words in found["problem"]
    check = look(tmp_path, bitsandbytes=found)["bitsandbytes at work"]
    slow = "sleep" in program  # not broken: the machine may be busy
    assert (check.status, check.found) == ("warning" if slow else "error", found["problem"])
    assert "--quantization none" in check.remedy


def test_a_probe_runs_in_a_separate_process() -> None:
    found = run_probe("nonsense")
    assert found.pop("seconds") < 120
    assert found == {"ok": False, "problem": "KeyError: 'nonsense'"}


def test_probes_run_side_by_side_and_a_slow_one_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All four meet at a barrier, which none could leave if they came one after the other."""
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    together = threading.Barrier(4, timeout=20)

    def probe(name: str) -> dict[str, Any]:
        together.wait()
        return {**FINE[name], "seconds": 45.0 if name == "transformers" else 3.0}

    checks = {check.name: check for check in diagnose(tmp_path / "c", tmp_path / "o", probe=probe).checks}
    slow = checks["transformers at work"]
    assert (slow.status, "after 45 s" in slow.found) == ("warning", True)
    assert checks["bitsandbytes at work"].status == "ok"


def test_the_remedy_for_versions_names_a_file_that_is_there() -> None:
    file = Path(module._PROBE_REMEDIES["transformers"].split()[7])
    assert file.name == "constraints.txt"
    assert file.is_file()


def test_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gpu(**torch: Any) -> Check:
        found = look(tmp_path, torch=torch)
        return next(check for name, check in found.items() if name.startswith("gpu"))

    assert gpu().status == "ok"
    busy = gpu(gpus=[{**GPU, "free_bytes": 20 << 30}])
    assert (busy.status, "20.0 of 80.0 GiB" in busy.found) == ("warning", True)
    assert "float16" in gpu(gpus=[{**GPU, "bfloat16": False}]).remedy
    monkeypatch.setattr(module, "_nvidia_driver", lambda: (None, ""))
    assert gpu(gpus=[]).status == "info"
    monkeypatch.setattr(module, "_nvidia_driver", lambda: ("A100, 550.54", "550.54"))
    assert "CUDA build of torch" in gpu(gpus=[], cuda_build=None).remedy
    old = gpu(gpus=[])
    assert "CUDA 13.0 needs driver 580 or newer" in old.found
    assert OLDER in old.remedy
    monkeypatch.setattr(module, "_nvidia_driver", lambda: ("A100, 580.65.06", "580.65.06"))
    assert "cannot use it" in gpu(gpus=[]).found
    assert "driver" in gpu(gpus=[]).remedy


@pytest.mark.parametrize(
    ("driver", "cuda", "expected"),
    [("579.99", "13.0", True), ("580.65.06", "13.0", False), ("550.54", "12.6", False), ("520.61", "12.6", True),
     ("", "13.0", False), ("550.54", "14.1", False)],
)  # fmt: skip
def test_which_drivers_are_too_old(driver: str, cuda: str, expected: bool) -> None:
    assert too_old(driver, cuda) is expected


def test_the_driver_is_read_from_what_nvidia_smi_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 570.124.06'\necho 'NVIDIA H100 80GB HBM3, 570.124.06'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    text = "NVIDIA H100 80GB HBM3, 570.124.06"
    assert module._nvidia_driver() == (f"{text}; {text}", "570.124.06")
    program.write_text("#!/bin/sh\necho 'no devices were found' >&2\n")
    assert module._nvidia_driver() == ("no devices were found", "")


def test_the_older_build_is_of_the_tested_torch() -> None:
    pins = module.tested_versions()
    assert f"torch=={pins['torch']} " in OLDER
    assert OLDER in (Path(__file__).resolve().parents[2] / "docs" / "requirements.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flags", "status"), [({"avx2", "avx512f"}, "warning"), ({"avx512_bf16"}, "ok"), ({"amx_bf16"}, "ok"), (None, "ok")]
)
def test_a_processor_without_bfloat16_is_advised_to_use_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: set[str] | None, status: str
) -> None:
    monkeypatch.setattr(module, "_nvidia_driver", lambda: (None, ""))
    monkeypatch.setattr(module, "cpu_flags", lambda: flags if flags is None else frozenset(flags))
    check = look(tmp_path, torch={"gpus": []})["processor"]
    assert check.status == status
    assert ("--dtype float32" in check.remedy) == (status == "warning")


def test_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    installed: dict[str, str] = {"peft": "0.5.0", "transformers": "5.21.0", "torch": "2.13.0+cpu"}

    def version(name: str) -> str:
        if name == "bitsandbytes":
            raise metadata.PackageNotFoundError(name)
        return installed.get(name) or real(name)

    monkeypatch.setattr(module.metadata, "version", version)
    found = look(tmp_path)
    assert found["torch"].status == "ok"
    assert found["transformers"].status == "info"
    assert found["peft"].status == "error"
    assert found["peft"].remedy == f"pip install 'peft=={module.tested_versions()['peft']}'"
    assert "not installed" in found["bitsandbytes"].found


def unwritable(real: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    def named(*arguments: Any, **settings: Any) -> Any:
        if Path(settings.get("dir") or "") == folder:
            raise PermissionError(13, "Permission denied")
        return real(*arguments, **settings)

    return named


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").mkdir()
    assert look(tmp_path)["reference cache"].status == "ok"
    assert list(tmp_path.iterdir()) == [tmp_path / "cache"], "what was written is removed again"
    with monkeypatch.context() as patch:
        real = module.tempfile.NamedTemporaryFile
        patch.setattr(module.tempfile, "NamedTemporaryFile", unwritable(real, tmp_path / "cache"))
        check = look(tmp_path)["reference cache"]
        assert (check.status, "Permission denied" in check.found) == ("warning", True)
        patch.setattr(module.tempfile, "NamedTemporaryFile", unwritable(real, tmp_path))
        assert look(tmp_path)["output folder"].status == "error"
    with monkeypatch.context() as patch:
        usage = module.shutil.disk_usage(tmp_path)
        patch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=5 << 20))
        assert look(tmp_path)["output folder"].status == "warning"
    (tmp_path / "out").write_text("")
    assert "is a file" in look(tmp_path)["output folder"].found


def test_environment_and_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = look(tmp_path)
    assert found["TRITON_INTERPRET"].status == found["CUDA_VISIBLE_DEVICES"].status == "warning"
    assert "HF_HUB_OFFLINE" in found["hub"].found
    for name in ("TRITON_INTERPRET", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name)

    def no_network(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was tried")

    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", no_network)
        assert look(tmp_path)["hub"].found == "not tried"
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    check = next(iter(module._hub({"HF_ENDPOINT": f"http://127.0.0.1:{port}"}, online=True)))
    assert (check.status, "refused" in check.found) == ("warning", True)


def test_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: 1 << 30)
    assert look(tmp_path)["memory"].found == "1.0 GiB available"
    assert look(tmp_path)["memory"].status == "warning"


@pytest.mark.parametrize("broken", [False, True])
def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    answers = {**FINE, "triton": {"ok": False, "problem": "ptxas is missing"}} if broken else FINE
    monkeypatch.setattr(module, "run_probe", answers.__getitem__)
    for arguments in (["doctor"], ["doctor", "--json"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == (5 if broken else 0)
        out = capsys.readouterr().out
        assert ("ptxas is missing" in out) == broken
    report = json.loads(out)
    assert report["dpoeng"] == metadata.version("dpoeng")
    assert str(Path.home()) + "/" not in out
    assert not (tmp_path / "refcache").exists()


def test_the_speed_of_the_bus_is_measured_and_shown(tmp_path: Path) -> None:
    # The host's own memory stands in for a card.
    assert 0.05 < probes.bus_speed(torch.device("cpu"), 1 << 20) < 5000
    found = look(tmp_path, torch={"gpus": [{**GPU, "bus_gb_per_s": 24.26}]})
    assert "24.3 GB/s from host memory" in found["gpu 0"].found


def test_how_fast_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the model that is named, without a byte written; else of a file that is gone afterwards."""
    assert "GB/s" in look(tmp_path)["disk"].found
    assert not list(tmp_path.iterdir())
    model = tmp_path / "model"
    model.mkdir()
    probe = FINE.__getitem__

    def disk() -> Check:
        return next(
            c for c in diagnose(tmp_path / "c", tmp_path / "o", model=model, probe=probe).checks if c.name == "disk"
        )

    assert "no *.safetensors" in disk().found
    for name in "ab":
        (model / f"{name}.safetensors").write_bytes(os.urandom(3 << 20))
    asked: list[list[Path]] = []
    real = module.read_speed
    monkeypatch.setattr(module, "read_speed", lambda files: (asked.append(list(files)), real(files))[1])
    assert disk().status == "ok"
    assert asked == [[model / "a.safetensors", model / "b.safetensors"]]
    monkeypatch.setattr(module, "available_memory", lambda: 1 << 20)
    found = disk()
    assert "host memory does not hold them" in found.found
    assert "--host-gib" in found.remedy


def test_the_speed_is_bytes_over_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 MB in half a second; and no more is read than is asked for."""
    from dpoeng.engine.checks import disk

    file = tmp_path / "file"
    file.write_bytes(bytes(5_000_000))
    ticks = iter([10.0, 10.5, 20.0, 20.5])
    monkeypatch.setattr(disk.time, "perf_counter", lambda: next(ticks))
    assert disk.read_speed([file]) == pytest.approx(0.01)
    monkeypatch.setattr(disk, "_CHUNK", 1_000_000)
    assert disk.read_speed([file], 2_000_000) == pytest.approx(0.004)
