"""The static gate of csrc/cuda: what it refuses, what makes it compile again, what it says without a compiler."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.instrument import store
from bench.machine_code.static_gate import cuda, nvcc, waiting

SM90 = "product_sm90<Up<bf16, false>, 128>"
GOOD = cuda.Facts(168, 0, 0, 0, 196704, 384, 1, 3000, hgmma=8, hmma=0, utmaldg=2, ldgsts=8, local=0, waited=0)
TOOLS = nvcc.find()
BIN = Path(sys.executable).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="nvdisasm is in Triton's wheel")
needs_nvcc = pytest.mark.skipif(bool(TOOLS.missing), reason=TOOLS.missing)

MANGLED = "_ZN3moe4cuda4sm9012product_sm90INS0_2UpINS_4bf16ELb0EEELi128EEEvT_"
LOG = f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{MANGLED}' for 'sm_90a'
ptxas info    : Function properties for {MANGLED}
    {{stack}} bytes stack frame, {{spills}} bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 4 barriers, 16 bytes smem
"""
RULE = "\n//--------------------- {} --------------------------\n"
LISTING = (
    RULE.format(f".nv.info.{MANGLED}")
    + "//----- nvinfo : EIATTR_MAX_THREADS\n .align 4\n /*0048*/ .word 0x00000180\n /*004c*/ .word 0x1\n"
    + RULE.format(f".text.{MANGLED}")
    + "{code}"
    + RULE.format(".text.another")
    + "        /*0000*/    LDL R1, [R2] ;\n"
)
LOAD = "@P2 LDG.E.128 R4, desc[UR6][R10.64]"
CODE = ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4]", "@P0 UTMALDG.3D [UR8], [UR4]", "LDGSTS.E.128 [R2], [R4.64]")


def compiled(code=CODE, stack=0, spills=0) -> cuda.Object:
    """Make what compiling a product with this machine code would give."""
    lines = "".join(f"        /*{16 * i:04x}*/    {line} ;\n" for i, line in enumerate(code))
    log = LOG.format(stack=stack, spills=spills)
    found = cuda.sections(LISTING.format(code=lines), MANGLED)
    figures = cuda.facts("sm_90a", cuda.used(log)[MANGLED], 196704, found)
    return cuda.Object("hash", 1.0, 100, cuda.warnings(log), {cuda.short(cuda.demangled(MANGLED)): figures})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"code": (*CODE, "LDL.64 R2, [R1+0x8]")}, "1 local-memory instructions"),
        ({"code": (*CODE, "STL [R1], R2")}, "1 local-memory instructions"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"spills": 12}, "12 of spills"),
        ({"code": CODE[1:]}, "no HGMMA"),
        ({"code": ("HMMA.16816.F32 R4, R8, R12, R4", *CODE[1:])}, "no HGMMA"),
        ({"code": (CODE[0], "UTMASTG.3D [UR8], [UR4]")}, "no UTMALDG"),
        ({"code": (*CODE, LOAD, "PRMT R9, R6, 0x7632, R9")}, "1 loads of 16 bytes that are waited for"),
        ({"code": (*CODE, LOAD, *["NOP"] * 15, "@!P1 STG.E.128 [R8.64], R4")}, "1 loads of 16 bytes"),
        ({"code": (*CODE, LOAD, *["NOP"] * 16, "PRMT R9, R6, 0x7632, R9")}, None),
        ({"code": (*CODE, LOAD, "IADD3 R4, R8, R9, RZ")}, None),
    ],
)
def test_absolute_rules_on_a_listing(changes, said):
    found = cuda.breaches("p.cu sm_90a", compiled(**changes))
    assert len(found) == (said is not None)
    assert said is None or (found[0].startswith(f"p.cu sm_90a {SM90}: ") and said in found[0])


WAITING = """
.text.kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/              @!P0 BRA `(.L_x_0) ;
        /*0020*/                   SYNCS.EXCH.64 URZ, [UR4], UR8 ;
        /*0030*/                   STS [R3], R4 ;
        /*0040*/                   LDC.64 R4, c[0x0][0x218] ;
        /*0050*/                   UTMACCTL.PF [UR4] ;
.L_x_0:
        /*0060*/                   ACQBULK ;
        /*0070*/               @P0 EXIT ;
        /*0080*/                   LDG.E R2, desc[UR4][R2.64] ;
.L_x_1:
        /*0090*/                   STG.E desc[UR4][R4.64], R7 ;
        /*00a0*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("line", "instead", "said"),
    [
        ("", "", None),
        ("ACQBULK", "NOP", "never waits"),
        ("     ACQBULK", "@P1 ACQBULK", "in some threads only"),
        ("STS [R3], R4", "@P2 EXIT", "EXIT before it waits"),
        ("STS [R3], R4", "CALL.REL.NOINC `(.L_x_0)", "CALL.REL.NOINC before it waits"),
        ("BRA `(.L_x_0)", "BRA `(.L_x_1)", "a jump past the wait for its predecessor, to .L_x_1"),
        ("LDG.E R2", "LDG.E.128.CONSTANT R2", "1 non-coherent loads"),
        *(("STS [R3], R4", code, f"{code.split(maxsplit=2)[code[0] == '@']} before it waits") for code in (
            "LDG.E.64 R2, desc[UR4][R2.64]", "@!P0 STG.E desc[UR4][R2.64], R4", "LD.E R2, [R4.64]", "ST.E [R4.64], R2",
            "RED.E.ADD.STRONG.GPU desc[UR4][R2.64], R4", "ATOMG.E.ADD R0, desc[UR4][R2.64], R4",
            "@UP0 UTMALDG.4D [UR8], [UR4]", "UTMASTG.4D [UR8], [UR4]", "LDGSTS.E.128 [R2], [R4.64]", "CCTL.E.PF2 [R4]",
        )),
    ],
)  # fmt: skip
def test_nothing_of_the_memory_of_all_comes_before_the_wait(line, instead, said):
    """Barriers, shared memory, parameters and tensor maps do."""
    found = waiting.faults(WAITING.replace(line, instead))
    assert len(found) == (said is not None) and (said is None or said in found[0])


def test_a_listing_is_read_kernel_by_kernel():
    figures = compiled().kernels[SM90]
    assert figures == dataclasses.replace(
        GOOD, static_bytes=16, instructions=3, hgmma=1, utmaldg=1, ldgsts=1, threads=384
    )


@pytest.mark.parametrize(
    ("kernel", "changes", "said"),
    [
        ("product_sm80<Up<float, true>>", {"hgmma": 0, "utmaldg": 0}, ["no HMMA"]),
        ("product_sm80<Up<float, true>>", {"hgmma": 0, "utmaldg": 0, "hmma": 8}, []),
        ("product_simt<Up<float, true>>", {"hgmma": 0, "utmaldg": 0}, []),
        ("gating_fwd_tokens<float, 8, 1>", {"hgmma": 0, "utmaldg": 0}, []),
    ],
)
def test_only_products_must_use_tensor_cores(kernel, changes, said):
    got = cuda.Object("", 1.0, 100, (), {kernel: dataclasses.replace(GOOD, **changes)})
    found = cuda.breaches("p.cu sm_80", got)
    assert len(found) == len(said) and all(word in line for word, line in zip(said, found, strict=True))


def test_complaints_of_ptxas_and_a_compiler_without_bounds_are_breaches():
    line = f"ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async are serialized in function '{MANGLED}'"
    got = dataclasses.replace(compiled(), warnings=cuda.warnings(f"{line}\n{line}\nptxas info : fine"), peak_mib=6000)
    found = cuda.breaches("p.cu sm_90a", got)
    assert len(found) == 2 and "Potential Performance Loss" in found[0] and SM90 in found[0] and "6000 MiB" in found[1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"blocks": 0}, "blocks 1 -> 0"),
        ({"static_bytes": 1024}, "static_bytes 0 -> 1024"),
        ({"dynamic_bytes": 200000}, "dynamic_bytes 196704 -> 200000"),
        ({"spill_bytes": 4}, "spill_bytes 0 -> 4"),
        ({"waited": 2}, "waited 0 -> 2"),
        ({"hgmma": 4}, "hgmma 8 -> 4"),
        ({"instructions": 2000}, None),
        ({"registers": 160}, None),
    ],
)
def test_what_got_worse_is_said_and_any_change_asks_for_an_update(changes, said):
    before = cuda.Object("a", 1.0, 100, (), {SM90: GOOD})
    after = cuda.Object("b", 9.0, 900, (), {SM90: dataclasses.replace(GOOD, **changes)})
    *worse, last = cuda.changes("p.cu sm_90a", before, after)
    assert worse == ([f"p.cu sm_90a {SM90}: {said}"] if said else []) and "--update" in last
    assert cuda.changes("p.cu sm_90a", before, dataclasses.replace(before, seconds=7.0, peak_mib=1)) == []


def test_names_are_short_and_enumerators_are_spelled():
    full = "void moe::cuda::sm80::product_sm80<moe::cuda::RowsTimes<moe::fp16, (moe::cuda::Summed)1> >(int, f<g>)"
    assert cuda.short(full) == "product_sm80<RowsTimes<fp16, kOuter>>"
    assert cuda.short(cuda.demangled("_ZN3moe4cuda39_GLOBAL__N__7c18a3e6_7_sums_cu_878b632f1fEv")) == "f"


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """A csrc with one source that includes a header through another, for one architecture."""
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    (tmp_path / "csrc" / "tests").mkdir()
    (tmp_path / "csrc" / "tests" / "stand_in.h").write_text("// CPU\n")
    (folder / "CMakeLists.txt").write_text(
        "set(CMAKE_CUDA_STANDARD 17)\nset(flags -O3 -Xcompiler=-Wall)\nforeach(source ${cuda_sources})\n"
        "  for_architectures(${source} arch=compute_90,code=sm_90 arch=compute_75,code=compute_75)\nendforeach()\n"
    )
    (folder / "a.cu").write_text('#include "outer.h"\n#include "absent.h"\n')
    (folder / "outer.h").write_text('#ifdef CPU\n#include "../tests/stand_in.h"\n#endif\n#include "../inner.h"\n')
    (tmp_path / "csrc" / "inner.h").write_text("// one\n")
    monkeypatch.setattr(nvcc, "CSRC", tmp_path / "csrc")
    monkeypatch.setattr(nvcc, "SOURCES", folder)
    monkeypatch.setattr(nvcc, "LISTS", folder / "CMakeLists.txt")
    monkeypatch.setattr(cuda, "FILE", tmp_path / "gate.json")
    return tmp_path / "csrc"


@pytest.mark.parametrize(
    ("name", "matters"),
    [("inner.h", True), ("cuda/outer.h", True), ("cuda/a.cu", True), ("tests/stand_in.h", False)],
)
def test_the_key_follows_included_headers(tree, name, matters):
    source = tree / "cuda" / "a.cu"
    before = nvcc.key(source, "sm_90", "13.0", "4.2", ())
    assert before == nvcc.key(source, "sm_90", "13.0", "4.2", ())
    path = tree / name
    path.write_text(path.read_text() + "// changed\n")
    assert (nvcc.key(source, "sm_90", "13.0", "4.2", ()) != before) == matters


def test_the_key_follows_flags_architecture_and_versions(tree):
    source = tree / "cuda" / "a.cu"
    keys = {nvcc.key(source, *rest) for rest in (("sm_90", "13.0", "4.2", ()), ("sm_80", "13.0", "4.2", ()))}
    keys |= {nvcc.key(source, "sm_90", "13.1", "4.2", ()), nvcc.key(source, "sm_90", "13.0", "4.3", ())}
    nvcc.LISTS.write_text(nvcc.LISTS.read_text().replace("-O3", "-O2"))
    assert len(keys | {nvcc.key(source, "sm_90", "13.0", "4.2", ())}) == 5


@needs_triton
def test_without_nvcc_the_hashes_decide(tree, monkeypatch, capsys):
    monkeypatch.setattr(nvcc.shutil, "which", lambda name: None)
    gate = ["static-gate", "--only", "cuda"]
    key = nvcc.key(tree / "cuda" / "a.cu", "sm_90", "13.0", "4.2", (cuda.COUNTED, cuda.DYNAMIC))
    versions, entry = {"nvcc": "13.0", "cutlass": "4.2"}, cuda.Object(key, 1.0, 100, (), {SM90: GOOD})
    cuda.save({"a.cu sm_90": entry}, versions)
    assert cuda.load() == (versions, {"a.cu sm_90": entry})
    assert main(gate) == 0
    said = capsys.readouterr().out
    assert "no nvcc on PATH" in said and "1 of 1 objects unchanged" in said
    (tree / "inner.h").write_text("// two\n")
    assert main(gate) == 1
    said = capsys.readouterr().out
    assert re.search(r"a\.cu sm_90: differs .* put nvcc .* static-gate --update", said)
    assert main([*gate, "--update"]) == 1 and cuda.load()[1]["a.cu sm_90"].hash == key, "nothing to write"
    cuda.save({"a.cu sm_90": dataclasses.replace(entry, kernels={SM90: dataclasses.replace(GOOD, local=2)})}, versions)
    assert main(gate) == 1 and "2 local-memory instructions" in capsys.readouterr().out


@needs_triton
def test_only_what_changed_is_compiled(tree, monkeypatch, capsys):
    monkeypatch.setattr(nvcc, "find", lambda: nvcc.Tools("nvcc", "13.0", "include", "4.2"))
    made: list[str] = []

    def compile_object(source, sm, tools, key):
        made.append(f"{source.name} {sm}")
        return cuda.Object(key, 1.0, 100, (), {SM90: GOOD})

    monkeypatch.setattr(cuda, "compile_object", compile_object)
    gate = ["static-gate", "--only", "cuda"]
    assert main(gate) == 1 and "--update" in capsys.readouterr().out, "nothing is committed yet"
    assert main([*gate, "--update"]) == 0 and main(gate) == 0 and len(made) == 2
    assert main([*gate, "--all"]) == 0 and len(made) == 3
    (tree / "cuda" / "b.cu").write_text("")
    assert main([*gate, "--update"]) == 0 and made[3:] == ["b.cu sm_90"]
    (tree / "cuda" / "a.cu").unlink()
    capsys.readouterr()
    assert main(gate) == 1 and "a.cu sm_90: compiled no more" in capsys.readouterr().out


def test_a_build_in_other_words_is_refused(tree):
    nvcc.LISTS.write_text("set_source_files_properties(a.cu)\n")
    with pytest.raises(ValueError, match=r"CMakeLists\.txt: got no for_architectures.* a\.cu"):
        nvcc.objects()
    with pytest.raises(ValueError, match="CMAKE_CUDA_STANDARD"):
        nvcc.flags()


def test_committed_figures_cover_every_object_and_keep_the_rules():
    """That they belong to these sources is for CI's `bench static-gate`."""
    _, known = cuda.load()
    assert set(known) == {f"{source.name} {sm}" for source, sm in nvcc.objects()}
    kernels = {kernel.partition("<")[0] for entry in known.values() for kernel in entry.kernels}
    assert kernels >= {"product_simt", "product_sm80", "product_sm90", "gating_fwd_tokens", "dispatch_fwd_place"}
    assert kernels >= {"combine_fwd_rows", "adaln_fwd_gating", "sums_fwd_ordered"}
    assert {sm for _, sm in nvcc.objects()} == {"sm_80", "sm_90", "sm_90a"}
    assert not [line for name, entry in known.items() for line in cuda.breaches(name, entry)]
    json.loads(cuda.FILE.read_text())


@needs_nvcc
@needs_triton
def test_a_real_file_is_compiled_and_read():
    (name,) = cuda.TINY
    source = nvcc.SOURCES / name.split()[0]
    got = cuda.compile_object(source, "sm_90", TOOLS, "key")
    (figures,) = [f for kernel, f in got.kernels.items() if kernel == "sums_fwd_ordered"]
    assert 8 < figures.registers < 256 and figures.instructions > 100 and figures.threads == 256
    assert 0 < figures.blocks <= 8 and figures.hgmma == figures.hmma == figures.local == 0
    assert got.seconds > 0 and 10 < got.peak_mib < 4000 and got.warnings == ()


@needs_nvcc
def test_nvcc_failing_says_what_it_said(tmp_path):
    (tmp_path / "broken.cu").write_text("int f() { return nothing_of_that_name; }\n")
    with pytest.raises(ValueError, match=r"broken\.cu: nvcc exits with .*nothing_of_that_name"):
        nvcc.cubin(tmp_path / "broken.cu", "sm_90", TOOLS, tmp_path / "out.cubin")


@needs_nvcc
@pytest.mark.parametrize("name", ["sums.cu", "combine.cu"])
def test_the_headers_found_are_those_that_nvcc_reads(name):
    source = nvcc.SOURCES / name
    command = [TOOLS.nvcc, *nvcc.flags(), "-isystem", TOOLS.cutlass, "-MM", str(source)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    read = {Path(word).resolve() for word in said.replace("\\\n", " ").split()[1:]}
    assert {path for path in read if nvcc.CSRC in path.parents} == {source, *nvcc.included(source)}


@needs_nvcc
@pytest.mark.skipif(not (BIN / "ninja").exists() or not (BIN / "cmake").exists(), reason="no cmake beside Python")
def test_architectures_and_flags_are_those_that_cmake_uses(tmp_path):
    pybind11 = pytest.importorskip("pybind11")
    command = [BIN / "cmake", "-S", store.ROOT, "-B", tmp_path, "-G", "Ninja", "-DMOE_KERNELS_CUDA=ON"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={BIN / 'ninja'}"]
    command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    subprocess.run(command, check=True, capture_output=True)
    objects = {}
    for entry in json.loads((tmp_path / "compile_commands.json").read_text()):
        if entry["file"].endswith(".cu"):
            words = entry["command"].split()
            assert not set(nvcc.flags()) - set(words)
            host_only = {"-D_cuda_EXPORTS", "-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden"}
            other = {"-forward-unknown-to-host-compiler", "-x", "-c", "-o", "-isystem"}
            names = "-gencode", "-Xcompiler=-ffile-prefix-map"  # architectures, and what errors call a file
            options = {word for word in words[1:] if word[0] == "-" and not word.startswith(names)}
            assert options - host_only - other == set(nvcc.flags())
            objects[Path(entry["file"]).name] = re.findall(r"code=(sm_\w+)", entry["command"])
    ours: dict[str, list[str]] = {}
    for source, sm in nvcc.objects():
        ours.setdefault(source.name, []).append(sm)
    assert ours == objects
