"""Compiles the Triton kernels for GPUs this machine lacks, and reports on the machine code.

    python -m atesd_kernels.tools.compile_report             # tables
    python -m atesd_kernels.tools.compile_report --check     # exit status 1 if a kernel spills, ...

It compiles every kernel for sm_80, sm_90, sm_100 and gfx942, with the argument types and divisibility of a real launch
at V = 151,936 in bf16 (`compile_cases.py`). It reports registers, spills, shared memory, tensor-core instructions, the
widths of loads in loops and a loop's instructions for each entry. Times are predicted from rooflines, not measured;
`python -m bench.gpu` measures.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .compile_cases import CASES, Case, path_table
from .gpus import GPUS, Gpu

MMA = {"sm_80": r"\bHMMA\.", "sm_90": r"\bHGMMA\.", "sm_100": r"\bUTC\w*MMA", "gfx942": r"\bv_mfma_"}
TMA = r"\bUTMALDG\b"


@dataclass
class MachineCode:
    """One kernel on one GPU."""

    case: Case
    gpu: Gpu
    registers: int
    spills: int
    shared: int
    mma: int  # instructions in the text
    tma: int  # loads by tensor descriptor in the text
    loads: Counter = field(default_factory=Counter)  # bits -> global loads in loops
    loop_instructions: int = 0

    @property
    def occupancy(self) -> float:
        """Resident threads over the maximum, as limited by registers and shared memory."""
        threads = self.case.num_warps(self.gpu.arch) * self.gpu.warp_size
        blocks = self.gpu.registers // (max(8, -(-self.registers // 8) * 8) * threads)
        if self.shared:
            blocks = min(blocks, self.gpu.shared_total // (self.shared + 1024))
        return min(blocks * threads, self.gpu.threads) / self.gpu.threads

    @property
    def instructions_per_entry(self) -> float:
        """Of a sweep's loop, which takes a block of entries a turn. A row kernel with many is bound by arithmetic."""
        block = self.case.constants(self.gpu.arch)["BLOCK"]
        return self.loop_instructions * self.case.num_warps(self.gpu.arch) * self.gpu.warp_size / block

    def faults(self) -> list[str]:
        found = []
        if self.spills:
            found.append(f"{self.spills} spill instructions")
        if self.case.is_matmul and not self.mma:
            found.append("no tensor-core instructions")
        if self.case.uses_tma(self.gpu.arch) and not self.tma:
            found.append("no loads by tensor descriptor")
        if self.case.is_sweep:
            found += self.load_faults()
        if self.shared > self.gpu.shared:
            found.append(f"{self.shared} bytes of shared memory, the limit is {self.gpu.shared}")
        return found

    def load_faults(self) -> list[str]:
        found = []
        narrow, wide = (sum(n for bits, n in self.loads.items() if (bits >= 64) == vector) for vector in (False, True))
        narrow = max(0, narrow - self.case.row_loads)
        if narrow:
            found.append(f"{narrow} loads of 32 bits or less in a loop, beside {wide} wider ones")
        if not wide:
            found.append("no vector loads in a loop")
        return found


def compile_case(case: Case, gpu: Gpu) -> MachineCode:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    constants = case.constants(gpu.arch)
    signature = case.signature(gpu.arch)
    # a launch specialises on these being multiples of 16: pointers from the allocator, strides and V
    divisible = [name for name in case.multiples_of_16 if signature.get(name) == "i32"]
    aligned = [i for i, name in enumerate(names) if signature[name][0] == "*" or name in divisible]
    source = ASTSource(
        case.kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items() if name in names},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    is_amd = gpu.arch.startswith("gfx")
    target = GPUTarget("hip", gpu.arch, 64) if is_amd else GPUTarget("cuda", int(gpu.arch[3:]), 32)
    options = {"num_warps": case.num_warps(gpu.arch), "num_stages": case.num_stages(gpu.arch)}
    kernel = triton.compile(source, target=target, options=options)
    read = read_amdgcn if is_amd else read_cubin
    registers, spills, text = read(kernel)
    mma, tma = (len(re.findall(pattern, text)) for pattern in (MMA[gpu.arch], TMA))
    shared = kernel.metadata.shared
    return MachineCode(
        case, gpu, registers, spills, shared, mma, tma, loop_loads(text), loop_instructions(text)
    )  # fmt: skip


def read_cubin(kernel) -> tuple[int, int, str]:
    """Returns the number of registers, the number of spill loads and stores, and the SASS."""
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def run(tool, option):
            done = subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True)
            return done.stdout

        usage, sass = run("cuobjdump", "-res-usage"), run("nvdisasm", "-c")
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    return registers, len(re.findall(r"\b(?:LDL|STL)\b", sass)), sass


def read_amdgcn(kernel) -> tuple[int, int, str]:
    asm = kernel.asm["amdgcn"]
    count = {name: int(n) for name, n in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", asm)}
    return count["vgpr_count"], count["vgpr_spill_count"], asm


WIDTHS = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "ushort": 16, "ubyte": 8, "short_d16": 16}
LOAD = re.compile(
    r"\bLDG(?:STS)?\.E((?:\.\w+)*)|\b(?:global|buffer)_load_(dwordx4|dwordx3|dwordx2|dword|ushort|ubyte|short_d16)"
)


INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+[@A-Z]|\s+(?:v|s|ds|global|buffer)_\w+")


def loops(lines: list[str]) -> list[range]:
    """Returns the lines of each loop: from a label to a branch back to it."""
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*([.\w$]+):", line))}
    found = []
    for i, line in enumerate(lines):
        branch = re.search(r"\bBRA(?:\.\w+)*\s+.*?`\(([.\w$]+)\)|\bs_c?branch\w*\s+([.\w$]+)", line)
        start = labels.get(branch[1] or branch[2]) if branch else None
        if start is not None and start < i:
            found.append(range(start, i + 1))
    return found


def load_bits(line: str) -> list[int]:
    """Returns the widths of the line's global loads. Skips 8-bit loads, which are masks."""
    found = []
    for match in LOAD.finditer(line):
        flags = (match[1] or "").split(".")
        nvidia = 128 if "128" in flags else 64 if "64" in flags else 16 if "U16" in flags else 32
        found.append(WIDTHS[match[2]] if match[2] else 8 if {"U8", "S8"} & set(flags) else nvidia)
    return [bits for bits in found if bits > 8]


def loop_loads(text: str) -> Counter:
    """Counts global loads in loops, by bits."""
    lines = text.splitlines()
    return Counter(bits for i in {i for loop in loops(lines) for i in loop} for bits in load_bits(lines[i]))


def loop_instructions(text: str) -> int:
    """Returns the instructions of the first loop with vector loads, which is a sweep's plain case; 0 without one."""
    lines = text.splitlines()
    for loop in sorted(loops(lines), key=lambda loop: loop.start):
        if any(bits >= 64 for i in loop for bits in load_bits(lines[i])):
            return sum(bool(INSTRUCTION.match(lines[i])) for i in loop)
    return 0


def report(gpus=GPUS, out=print) -> list[str]:
    """Prints the tables. Returns the faults."""
    faults = []
    columns = (
        "kernel",
        "GPU",
        "registers",
        "spills",
        "shared",
        "occupancy",
        "tensor-core",
        "TMA",
        "loop loads (bits x n)",
        "instructions/entry",
    )
    out(f"| {' | '.join(columns)} | B/row | FLOP/row |")
    out("|---" * 12 + "|")
    for case in CASES:
        for gpu in gpus:
            c = compile_case(case, gpu)
            instructions = f"{c.instructions_per_entry:.0f}" if case.is_sweep and not case.is_matmul else ""
            loads = " ".join(f"{bits}x{n}" for bits, n in sorted(c.loads.items(), reverse=True))
            out(
                f"| {case.name} | {gpu.arch} | {c.registers} | {c.spills} | {c.shared} | {c.occupancy:.0%} | {c.mma} "
                f"| {c.tma} | {loads} | {instructions} | {case.bytes_per_row:,.0f} | {case.flops_per_row:,.0f} |"
            )
            faults += [f"{case.name} on {gpu.arch}: {fault}" for fault in c.faults()]
    out("")
    path_table(gpus, out, faults)
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit with status 1 if there is a fault")
    parser.add_argument("--arch", choices=[g.arch for g in GPUS], action="append", help="repeatable (default: all)")
    arguments = parser.parse_args()
    faults = report([g for g in GPUS if not arguments.arch or g.arch in arguments.arch])
    print("\n".join(["", f"{len(faults)} fault(s)", *faults]))
    return 1 if arguments.check and faults else 0


if __name__ == "__main__":
    sys.exit(main())
