"""Kernels compiled ahead of time for GPUs that need not be there: registers, spills, occupancy, instructions.

`python -m benchmarks.aot.compiler 90 [CASE...]` compiles variants of variants.py for one target and prints one JSON
object. `compile_all` does so for several targets at once, each in a process of its own, because the interpreter that
tests use replaces the compiler when triton is imported.

Instructions are read from the machine code (SASS), which ptxas may have made other than PTX says. Starting the
disassembler costs more than its work: the code of all kernels of a target goes through it in one piece.
"""

import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What nvdisasm calls the targets that triton compiles for.
TARGETS = {80: "SM80", 90: "SM90a", 100: "SM100a"}
# The case that shows that a tensor-core instruction would be seen.
GUARD = "tf32_product"
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)", re.M)
INSTRUCTION_BYTES = 16
# mma and its descendants: HMMA and IMMA on Ampere, HGMMA on Hopper, UTCHMMA and the like on Blackwell.
TENSOR = re.compile(r"(?:UTC)?[A-Z]?G?MMA$")


def occupancy(capability: int, registers: int, shared: int, warps: int, tensor_columns: int = 0) -> dict:
    """Programs that fit a multiprocessor, their share of the warps it holds, and what allows no more of them.

    registers: of a thread. shared: bytes that a program asks for. tensor_columns: of tensor memory.
    Limits: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability": 64 warps, 32 blocks and
    65,536 registers for 8.0, 9.0 and 10.0, shared memory of 164 KB for 8.0 and 228 KB for 9.0 and 10.0, of which 1 KB a
    block is the system's; tensor memory: PTX ISA, 512 columns. How it is handed out: cuda_occupancy.h of the CUDA
    toolkit, registers to a warp in units of 256, from the quarter of the file that the warp's scheduler has; shared
    memory in units of 128 bytes.
    """
    memory = (164 if capability == 80 else 228) * 1024
    block = -(-(shared + 1024) // 128) * 128
    of_warp = -(-registers * 32 // 256) * 256
    limits = {
        "warps": 64 // warps,
        "programs": 32,
        "registers": 65536 // 4 // of_warp * 4 // warps,
        "shared": memory // block,
    }
    if tensor_columns:
        limits["tensor memory"] = 512 // tensor_columns
    limit = min(limits, key=limits.get)
    return {"programs": limits[limit], "occupancy": limits[limit] * warps / 64, "limit": limit}


def mix(instructions: Sequence[str]) -> dict:
    """Counts of what matters among instructions such as "LDG.E.128"; `wide` ones move 16 bytes a thread or more."""
    split = [name.split(".") for name in instructions]
    bases = Counter(base for base, *_ in split)
    wide = Counter(base for base, *rest in split if {"128", "256"} & set(rest))
    tensor = {base: n for base, n in bases.items() if TENSOR.match(base)}
    loads, stores = ("LDG", "LDGSTS"), ("STG",)
    return {
        "instructions": len(split) - bases["NOP"],
        "tensor": " ".join(f"{base} {n}" for base, n in sorted(tensor.items())),
        # FFMA2 is two of them.
        "ffma": bases["FFMA"] + 2 * bases["FFMA2"],
        "ldg": sum(bases[base] for base in loads),
        "ldg_wide": sum(wide[base] for base in loads),
        "stg": sum(bases[base] for base in stores),
        "stg_wide": sum(wide[base] for base in stores),
        "lds": bases["LDS"] + bases["LDSM"],
        "sts": bases["STS"] + bases["STSM"],
        "bar": bases["BAR"],
        "atom": sum(bases[base] for base in ("ATOM", "ATOMG", "ATOMS", "RED", "REDG", "REDS")),
        "mufu": bases["MUFU"],
        "local": bases["LDL"] + bases["STL"],
    }


def compile_case(case: str, capability: int):
    """(what triton made of a variant as a launch on `capability` would, the kernel's name)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from benchmarks.aot.launches import kernel_and_types, tf32_product
    from benchmarks.aot.variants import CASES

    if case == GUARD:
        kernel, types = tf32_product, dict.fromkeys(("a_ptr", "b_ptr", "out_ptr"), "*fp32")
        settings, aligned = {"SIDE": 64, "enable_fp_fusion": True}, ()
    else:
        op, elements, constants, aligned = CASES[case]
        kernel, types, settings = kernel_and_types(op, elements, capability)
        settings = constants | settings
    constants = {name: value for name, value in settings.items() if name in kernel.arg_names}
    options = {name: settings[name] for name in OPTIONS if name in settings}
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options), kernel.__name__


def tool(name: str, *arguments: str) -> str:
    """What a tool of NVIDIA's in triton's wheel prints."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> dict:
    """Registers of a thread, and bytes of its stack: spills, as no kernel has arrays."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {"registers": found["REG"], "stack": found["STACK"] + found["LOCAL"]}


def machine_code(cubin: bytes) -> bytes:
    """The instructions in a cubin, an ELF file of 64 bits, little-endian, with one kernel."""
    (headers,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<3H", cubin, 58)
    # Of a section: where its name is, and after type, flags and address where it is and how long.
    sections = [struct.unpack_from("<I4xQQQQ", cubin, headers + i * size) for i in range(count)]
    text = []
    for name, _flags, _address, offset, length in sections:
        begin = sections[names][3] + name
        if cubin[begin:].startswith(b".text."):
            text.append(cubin[offset : offset + length])
    assert len(text) == 1, f"{len(text)} sections of instructions, expected 1"
    return text[0]


def disassemble(codes: Sequence[bytes], capability: int) -> list[list[str]]:
    """The instructions of each kernel, with their modifiers and without operands."""
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        lines = tool("nvdisasm", "--binary", TARGETS[capability], file.name)
    found = [(int(at, 16), name) for at, name in INSTRUCTION.findall(lines)]
    # Were a line not understood, kernels would be mixed up.
    assert [at for at, _ in found] == list(range(0, sum(map(len, codes)), INSTRUCTION_BYTES))
    names = iter(name for _, name in found)
    return [[next(names) for _ in range(len(code) // INSTRUCTION_BYTES)] for code in codes]


def compile_target(capability: int, cases: Collection[str]) -> dict[str, dict]:
    """What is in the report for each case."""
    found, codes = {}, []
    for case in cases:
        compiled, kernel = compile_case(case, capability)
        metadata = compiled.metadata
        row = {"kernel": kernel, "case": case, "sm": capability, **resources(compiled.asm["cubin"])}
        row |= {"shared": metadata.shared, "warps": metadata.num_warps, "stages": metadata.num_stages}
        row |= occupancy(capability, row["registers"], row["shared"], row["warps"], metadata.tmem_size or 0)
        # Whether fp32 operations are rounded one by one, which divisions hide in the machine code.
        row["ptx_fma"] = len(re.findall(r"^\s+(?:@!?%p\d+ )?fma\.", compiled.asm["ptx"], re.M))
        found[case] = row
        codes.append(machine_code(compiled.asm["cubin"]))
    for row, instructions in zip(found.values(), disassemble(codes, capability), strict=True):
        row |= mix(instructions)
    return found


def compile_all(capabilities: Collection[int], cases: Collection[str] = ()) -> dict[str, dict]:
    """ "CASE/CAPABILITY" -> its row, of all cases unless some are named; RuntimeError with what a compiler said."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        # The same triton as here, with an empty cache, so that it really runs.
        path = filter(None, (os.environ.get("PYTHONPATH"), str(ROOT)))
        environment |= {"PYTHONPATH": os.pathsep.join(path), "TRITON_CACHE_DIR": cache}
        runs = {
            capability: subprocess.Popen(
                [sys.executable, "-m", "benchmarks.aot.compiler", str(capability), *cases],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for capability in capabilities
        }
        outputs = {capability: (run, *run.communicate()) for capability, run in runs.items()}
    results = {}
    for capability, (run, output, errors) in outputs.items():
        if run.returncode:
            raise RuntimeError(f"compiling for sm_{capability}: {errors[-4000:]}")
        found = json.loads(output.splitlines()[-1])
        results |= {f"{case}/{capability}": row for case, row in found.items()}
    return results


if __name__ == "__main__":
    import gc

    from benchmarks.aot.variants import CASES

    # A tenth of the time goes into looking for garbage among syntax trees.
    gc.disable()
    print(json.dumps(compile_target(int(sys.argv[1]), sys.argv[2:] or [*CASES, GUARD])))
