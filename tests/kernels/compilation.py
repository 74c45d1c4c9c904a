"""Compile kernels for an H200 where they would be launched, without a GPU, in a process without triton's interpreter.

That shows what the interpreter does not see: types, shapes and names that the compiler refuses, and how much shared
memory a program needs.
"""

import json
from typing import Any

import torch

from dualview.kernels import dispatch

TYPES = {
    **{torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64"},
    **{torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"},
}


def compile_in_place_of_launching() -> None:
    """From now on, and for good: a launch compiles what it would run, once, and prints what that is in JSON."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    compiled: set[str] = set()

    def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        values = dict(zip(kernel.arg_names, args, strict=False)) | options
        types, constants, aligned = {}, {}, {}
        for place, parameter in enumerate(kernel.params):
            name, value = parameter.name, values[parameter.name]
            if isinstance(value, torch.Tensor):
                types[name], aligned[(place,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
            elif parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
                types[name], constants[name] = "constexpr", value
            else:
                types[name] = "fp32" if isinstance(value, float) else "i32"
                if value % 16 == 0 and not parameter.do_not_specialize:
                    aligned[(place,)] = [["tt.divisibility", 16]]
        choices = {"num_warps": options.get("num_warps", 4), "num_stages": options.get("num_stages", 3)}
        shown = {"kernel": kernel.fn.__name__, "type": types[kernel.arg_names[0]], **constants, **choices}
        if str(shown) in compiled:
            return
        compiled.add(str(shown))
        source = ASTSource(kernel, types, constants, aligned)
        found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=choices)
        assert "st.global" in found.asm["ptx"]
        print(json.dumps(shown | {"shared": found.metadata.shared}))

    def compile_every_choice(tuned: Autotuner, *args: Any, **options: Any) -> None:
        for config in tuned.configs:
            tuned.fn.run(*args, **options, **config.all_kwargs())

    JITFunction.run, Autotuner.run = compile_only, compile_every_choice
    dispatch.runs_on, dispatch._refusals = lambda x: True, lambda kernel, x: ()
