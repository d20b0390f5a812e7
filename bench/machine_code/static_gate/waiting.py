"""What kernels do before they wait for the kernel before them, which has not ended where they start early.

csrc/cuda/device.h has the rules. griddepcontrol.wait is ACQBULK: no thread may get past it, and before it nothing may
touch global memory.
"""

from __future__ import annotations

import re

from bench.machine_code.static_gate.machine import INSTRUCTION

SINCE = 90  # the first architecture that has the instruction
WAIT = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@\S+\s+)?ACQBULK\b", re.MULTILINE)
# Loads and stores of global or unknown memory, and TMA's; what stays in a block (LDS, LDC, SYNCS, ...) is not in it.
GLOBAL = re.compile(r"(?:LD|ST|LDG|STG|LDGSTS|RED|REDG|ATOM|ATOMG|CCTL|TEX|TLD|SULD|SUST|U?TMA(?!CCTL)\w*|UBLK\w*)\Z")
LEAVES = re.compile(r"(?:EXIT|RET|CALL|BRX|BRXU|JMP|JMX|JMXU)\Z")
NON_COHERENT = re.compile(r"\bLDG\.[.\w]*\bCONSTANT\b")


def faults(code: str) -> list[str]:
    """Say what a kernel's listing (nvdisasm, with labels) does too early; nothing said is a proof.

    Up to the wait every jump must stay before it, so that whatever path a thread takes it waits. Non-coherent loads are
    refused wherever they stand: what they hit in a cache may be older than the wait.
    """
    wait = WAIT.search(code)
    if wait is None:
        return ["never waits for its predecessor, expected wait_for_predecessor or take_turn"]
    before = code[: wait.start()]
    out = ["waits for its predecessor in some threads only"] if wait[1] else []
    for _, name, rest, _ in INSTRUCTION.findall(before):
        if GLOBAL.match(name) or LEAVES.match(name):
            out.append(f"{name}{rest} before it waits for its predecessor")
    labels = set(re.findall(r"^(\.L\w+):", before, re.MULTILINE))
    out += [
        f"a jump past the wait for its predecessor, to {to}"
        for to in re.findall(r"`\((\.L\w+)\)", before)
        if to not in labels
    ]
    if count := len(NON_COHERENT.findall(code)):
        out.append(f"{count} non-coherent loads, expected no const __restrict__ parameters and no __ldg")
    return out
