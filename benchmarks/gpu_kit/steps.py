"""Step times on the device: eager, compiled, as a CUDA graph; and a rank's share of large layers.

A step is forward, backward and AdamW, in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from autoparallel.support.torch_private import fake_process_group
from gpu_kit.setting import Setting, median_seconds

__all__ = ["predicted", "shares", "step_times"]


def _stepper(model: Any, batch: dict[str, Any], setting: Setting, compiled: bool = False) -> Any:
    """Return a function that makes a step of training."""
    options: dict[str, Any] = {"fused": True, "capturable": True} if setting.cuda else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **options)
    runs = torch.compile(model, fullgraph=True) if compiled else model

    def step() -> None:
        optimizer.zero_grad()
        runs(**batch).loss.backward()
        optimizer.step()

    return step


def _graphed(step: Callable[[], Any]) -> Callable[[], Any]:
    """Return a step that replays what was captured of it as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _waits(step: Callable[[], Any], setting: Setting) -> str:
    """Return what a step waits for the GPU for, "" for nothing."""
    if not setting.cuda:
        return "not asked on a CPU"
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def step_times(setting: Setting) -> Iterator[dict[str, Any]]:
    """Time a GPT by the plain model, by ours and by hand-written layers, on one rank."""
    import autoparallel
    from megatron_rules.models import ParallelGPT

    def plain() -> Any:
        return setting.gpt().to(torch.bfloat16)

    def ours() -> Any:
        model = plain()
        return autoparallel.autoparallelize(model, 1, example_inputs=setting.batch(model))

    def by_hand() -> Any:
        model = plain()
        with torch.device(setting.device):
            hand = ParallelGPT(model.config).to(torch.bfloat16)
        hand.load_plain(model.state_dict())
        return hand

    batch = setting.batch(setting.gpt())
    for name, make in (("plain", plain), ("ours", ours), ("hand-written", by_hand)):
        for way in ("eager", "compiled", "CUDA graph"):
            row = {"model": name, "way": way, "seconds": None, "waits": ""}
            if way == "CUDA graph" and not setting.cuda:
                yield {**row, "absent": "there is no GPU"}
                continue
            try:
                step = _stepper(make(), batch, setting, way == "compiled")
                if way == "eager":
                    row["waits"] = _waits(step, setting)
                step = _graphed(step) if way == "CUDA graph" else step
                yield {**row, "seconds": median_seconds(step, setting)}
            except Exception as error:
                lines = str(error).strip().splitlines() or [""]
                yield {**row, "absent": f"{type(error).__name__}: {lines[0]}"}
            torch.compiler.reset()


def _gpt3_layer(setting: Setting) -> Any:
    """Return one layer of GPT-3 175B with a small vocabulary, on the meta device."""
    from autoparallel.train.models import GPT, GPTConfig

    large = {"hidden": 12288, "heads": 96, "vocabulary": 1024, "positions": 2048}
    tiny = {"hidden": 64, "heads": 8, "vocabulary": 64, "positions": 16}
    with torch.device("meta"):
        return GPT(GPTConfig(layers=1, dropout=0.0, **(large if setting.cuda else tiny)))


def _llama_layer(setting: Setting) -> Any:
    """Return one layer of Llama-3-8B with a small vocabulary, on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    large = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 1024,
    }
    tiny = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 64,
    }
    sizes = large if setting.cuda else tiny
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, use_cache=False, **sizes))


def shares(setting: Setting) -> Iterator[dict[str, Any]]:
    """Time what one rank of eight computes of a layer of GPT-3 and of Llama-3-8B.

    The other ranks do not run: collectives of the group return at once, so that what is timed is
    computing alone.
    """
    fake_process_group(0, 8)
    mesh = init_device_mesh(setting.device, (8,), mesh_dim_names=("tp",))
    for name, make in (("GPT-3 layer", _gpt3_layer), ("Llama-3-8B layer", _llama_layer)):
        for sequence_parallel in (False, True):
            kind = "sequence parallel" if sequence_parallel else "tensor parallel"
            row = {"model": f"{name}, tp=8, {kind}", "waits": ""}
            try:
                for way, step in _share(setting, make, mesh, sequence_parallel):
                    waits = _waits(step, setting) if way == "ours" else ""
                    seconds = median_seconds(step, setting)
                    yield {**row, "way": way, "seconds": seconds, "waits": waits}
            except Exception as error:
                lines = str(error).strip().splitlines() or [""]
                yield {**row, "way": "ours", "failed": f"{type(error).__name__}: {lines[0]}"}
    dist.destroy_process_group()


def _share(
    setting: Setting, make: Callable[[Setting], Any], mesh: Any, sequence_parallel: bool
) -> Iterator[tuple[str, Any]]:
    """Yield a step by this project, and one by hand-written layers where there are any.

    make: a function that returns the layer on the meta device. mesh: of all ranks.
    """
    import autoparallel
    from autoparallel.train.models import GPT
    from megatron_rules.models import ParallelGPT

    tokens = torch.zeros(1, 2048 if setting.cuda else 16, dtype=torch.long, device=setting.device)
    batch = {"input_ids": tokens, "labels": tokens}
    model = make(setting).to(torch.bfloat16)
    plan = autoparallel.make_plan(
        model,
        8,
        example_inputs={name: value.to("meta") for name, value in batch.items()},
        sequence_parallel=sequence_parallel,
        hardware="dgx-h100",
    )
    split = autoparallel.apply_plan(model, plan, mesh=mesh, check_inputs=0)
    yield "ours", _stepper(split, batch, setting)
    del split
    if isinstance(model, GPT):
        with torch.device(setting.device):
            hand = ParallelGPT(
                model.config, sequence_parallel=sequence_parallel, keep_gathered=True
            ).to(torch.bfloat16)
        yield "hand-written", _stepper(hand, batch, setting)


def predicted(setting: Setting, folder: Any) -> Iterator[dict[str, Any]]:
    """Calibrate quickly, and compare the predicted step of a GPT with the measured one."""
    import autoparallel
    from autoparallel.cost.calibrate import calibrate
    from autoparallel.cost.hardware import write_hardware
    from autoparallel.cost.timed_runs import Effort

    with torch.no_grad():
        measured = calibrate(Effort.quick(setting.cuda))
    file = folder / "this-machine.json"
    write_hardware(measured.hardware, file)
    model = setting.gpt().to(torch.bfloat16 if setting.cuda else torch.float32)
    batch = setting.batch(model)
    plan = autoparallel.make_plan(model, 1, example_inputs=batch, hardware=str(file))
    split = autoparallel.apply_plan(model, plan, check_inputs=0)
    seconds = median_seconds(_stepper(split, batch, setting), setting)
    errors = sorted(abs(row.error) for row in measured.rows)
    yield {
        "model": "GPT, 1 rank",
        "way": "ours",
        "predicted": plan.seconds,
        "seconds": seconds,
        "fit": errors[len(errors) // 2] if errors else None,
    }
