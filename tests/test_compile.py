"""`engrax compile`: what is read from a compiled program, what is saved, and what is refused.

Programs for absent devices are compiled by `make test-compile`; here the whole way is taken for the CPU.
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest

from engrax import cli
from engrax.errors import UserError
from engrax.pallas_kernels import devices, dispatch, topologies
from engrax.pallas_kernels.common.log_decay import LogDecayShapes
from engrax.pallas_kernels.gated_delta_rule import cost as delta_cost
from engrax.tests import compile_configs
from engrax.tests.experiments import small
from engrax.train import (
    ParallelConfig,
    compile_report,
    cost,
    kernel_report,
    program_cost,
    program_text,
    roofline,
    temporaries,
)
from engrax.train import compile as compiling
from engrax.train.trainer import Trainer

# Of a TPU's program, shortened: a loop of 8 that counts by 2 and holds a kernel of the backward pass, a product written
# as a convolution over padding, and one all-gather in two fusions.
TPU = """HloModule jit_step, is_scheduled=true

%gather.1 (p.1: bf16[4,16]) -> bf16[32,16] {
  %p.1 = bf16[4,16]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[32,16]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.1), channel_id=7, dimensions={0}
}

%gather.2 (p.2: bf16[4,16]) -> bf16[32,16] {
  %p.2 = bf16[4,16]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[32,16]{1,0} all-gather(%p.2), channel_id=7, dimensions={0}
}

%cond (c: (s32[], f32[8,64,32])) -> pred[] {
  %c = (s32[], f32[8,64,32]{2,1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%c), index=0
  %limit = s32[]{:T(128)} constant(8), metadata={op_name="jit(step)"}
  ROOT %lt = pred[] compare(%i.1, %limit), direction=LT
}

%body (b: (s32[], f32[8,64,32])) -> (s32[], f32[8,64,32]) {
  %b = (s32[], f32[8,64,32]{2,1,0}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%b), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i.2, %two)
  %x = f32[8,64,32]{2,1,0} get-tuple-element(%b), index=1
  %kernel = f32[8,64,32]{2,1,0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="PLACE"}
  ROOT %out = (s32[], f32[8,64,32]{2,1,0}) tuple(%next, %kernel)
}

ENTRY %main (a: f32[8,64,32], w: bf16[4,16]) -> f32[64,8,48] {
  %a = f32[8,64,32]{2,1,0} parameter(0)
  %w = bf16[4,16]{1,0} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[], f32[8,64,32]{2,1,0}) tuple(%zero, %a)
  %while.1 = (s32[], f32[8,64,32]{2,1,0}) while(%start), condition=%cond, body=%body, backend_config={"flag_configs":[]}
  %y = f32[8,64,32]{2,1,0} get-tuple-element(%while.1), index=1
  %f.1 = bf16[32,16]{1,0:S(1)} fusion(%w), kind=kCustom, calls=%gather.1
  %f.2 = bf16[32,16]{1,0} fusion(%w), kind=kCustom, calls=%gather.2
  %k = f32[8,48,32]{2,1,0} constant({...})
  ROOT %conv = f32[64,8,48]{2,1,0} convolution(%y, %k), window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0oi->b0f
}
""".replace("PLACE", "jit(step)/transpose(jvp())/while/body/gated_delta_rule_backward/pallas_call")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no change of the process by the command."""
    monkeypatch.setenv("ENGRAX_CACHE", str(tmp_path))
    monkeypatch.setattr(topologies, "prepare", lambda: None)
    return tmp_path


def experiment(**fields):
    return small(parallel=ParallelConfig(data=1), **fields)


@pytest.fixture(scope="module")
def result():
    """What compiling a small step for the CPU finds."""
    return compiling.compile_step(experiment(), "cpu", config="small")


def test_a_step_compiled_for_the_cpu(result):
    trainer = Trainer(experiment())
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trainer.abstract_state()))
    batch = 3 * 4 * experiment().batch_size * experiment().data.seq_len
    memory = result["memory"]
    assert memory["arguments"] == state + batch and memory["aliased"] == state  # the state is donated
    assert memory["temporaries"] > 0 and memory["fits"] is None
    assert [row["op"] for row in result["operations"]] == ["neural_memory", "linear_cross_entropy"]
    assert all(row["served_by"] == "xla" for row in result["operations"]) and result["kernels"] == []
    assert result["flops"]["products"]["forward"] > 0 and result["flops"]["program"] > 0 and result["bytes"] > 0
    assert result["time"]["seconds"] is None, "no figure of this CPU is known"
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_the_result_in_words(result):
    told = compile_report.format_result(result)
    assert told.startswith("training step compiled for cpu, 1 device (data=1, fsdp=1, ZeRO 0): 16 rows of 24 tokens")
    assert "least time             not available" in told and "xla" in told
    lost = result | {"memory": {"fits": False, "compiler": "Ran out of memory"}}
    for name in ("kernels", "flops", "not_available"):
        del lost[name]
    assert "it does not fit: Ran out of memory" in compile_report.format_result(lost)


def test_products_in_loops_count_once_per_turn():
    def loss(w, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])

    w, x = jnp.zeros((5, 16, 16)), jnp.zeros((8, 16))
    program = program_text.read(jax.jit(jax.grad(loss)).lower(w, x).compile().as_text())
    one = 5 * 2 * 8 * 16 * 16
    assert program_cost.products(program) == {"forward": one, "recomputed": 0, "backward": 2 * one}


def test_kernels_collectives_and_products_of_a_tpu_program():
    program = program_text.read(TPU)
    (kernel,) = program_cost.kernels(program)
    assert kernel[:3] == ("gated_delta_rule_backward", "backward", 4.0), "8 in steps of 2"
    assert kernel.arrays == (8 * 64 * 32, 8 * 64 * 32)
    assert program_cost.collectives(program) == {"all-gather": {"count": 1.0, "bytes": 32 * 16 * 2.0}}
    assert program_cost.products(program)["forward"] == 8 * 2 * 64 * 48 * 32  # 8 products, the padding apart
    # The kernel and the counter four times, the two gathers (the result of one lies on the chip), the product.
    assert program_cost.largest(program, 1) == [{"dtype": "f32", "dims": [64, 8, 48], "bytes": 4 * 64 * 8 * 48}]
    large, counter = 4 * 8 * 64 * 32, 3 * 4
    kernel_bytes, gathers, product = 2 * large, (128 + 0) + (128 + 1024), large + 4 * 8 * 48 * (32 + 64)
    assert program_cost.traffic(program) == 4 * (kernel_bytes + counter) + gathers + product


def test_a_loop_without_a_fixed_length_is_not_guessed():
    program = program_text.read(TPU.replace("constant(2)", "constant({...})").replace("%two)", "%i.2)"))
    (kernel,) = program_cost.kernels(program)
    assert math.isnan(kernel.times)
    cleaned = compiling._clean({"rows": compiling._kernel_rows([kernel])})
    assert cleaned["rows"][0]["times"] is None


def delta_call(**sizes):
    sizes = dict(batch=8, length=128, query_heads=2, heads=2, key=64, value=64, chunk=64) | sizes
    return dispatch.Call(
        "gated_delta_rule", LogDecayShapes(**sizes, dtype=jnp.dtype("bfloat16"), gate="scalar", segments=False), None
    )


def kernel(name, stage, elements):
    return program_cost.Kernel(f"gated_delta_rule_{name}", stage, 3.0, (elements,))


def test_flops_of_kernels_are_those_of_the_operation():
    small_call, large = delta_call(), delta_call(length=256)
    names = [
        ("forward", "forward"),
        ("forward", "recomputed"),
        ("backward_states", "backward"),
        ("backward", "backward"),
    ]
    kernels = [kernel(*name, 8 * 128 * 2 * 64 // 4) for name in names]
    cost = delta_cost.flops(batch=8, seq=128, heads=2, query_heads=2, key=64, value=64)
    wanted = {"forward": 3 * cost.forward / 4, "recomputed": 3 * cost.forward / 4, "backward": 3 * cost.backward / 4}
    assert roofline.kernel_flops(kernels, [small_call], 4) == wanted
    assert roofline.kernel_flops(kernels, [small_call, large], 4) == wanted, "told apart by the size of the values"
    with pytest.raises(LookupError, match="gated_delta_rule_forward cannot be told apart"):
        roofline.kernel_flops([kernel("forward", "forward", 1)], [small_call, large], 4)


def test_an_implementation_that_needs_its_device_is_replaced_and_named():
    call = delta_call(length=256, key=128, value=128)
    with devices.use(devices.NAMED["v5e"]):
        chosen = dispatch.choose(*call)
        with dispatch.without("pallas_tpu"):
            assert [found.name for _, found in dispatch.choose(*call).branches] == ["xla"]
    assert chosen.branches[0][1].name == "pallas_tpu"
    row = kernel_report.OperationRow(call, dispatch.Served("cudnn_attention", {}))
    (note,) = compiling._notes([row])
    assert note.startswith("gated_delta_rule is compiled in XLA: 'cudnn_attention', which serves it on the device")
    assert compiling._notes([row._replace(served=dispatch.Served("xla", {}))]) == []


def test_what_is_refused(cache, capsys, monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    no_mesh = "--mesh '8' is no mesh; write axes and their devices, such as data=2,fsdp=4."
    for words, told in {
        "quickstart --device h20": "cannot compile for 'h20'; did you mean 'h200'? (known: h200, v5e, v6e, cpu).",
        "quickstart --device h200": "compiling for h200 needs its compiler, which is not installed; "
        "run pip install 'engrax[cuda]'.",
        "quickstart --device v5e": "compiling for v5e needs its compiler, which is not installed; "
        "run pip install 'engrax[tpu]'.",
        "quickstart --device cpu --mesh 8": no_mesh,
        "quickstart --device cpu --mesh fsdp=64": "a mesh of 64 CPU devices needs as many here, there are 1; set "
        "XLA_FLAGS=--xla_force_host_platform_device_count=64.",
    }.items():
        assert cli.main(["compile", *words.split()]) == 2
        assert capsys.readouterr().err == f"engrax: {told}\n"


def test_meshes_that_do_not_divide():
    tpu, gpu = topologies.TARGETS["v5e"], topologies.TARGETS["h200"]
    with pytest.raises(UserError, match="no slice of TPU v5 lite has 3 devices; choose a mesh of 1, 4, 8"):
        topologies.topology_devices(tpu, 3)
    with pytest.raises(UserError, match="12 GPUs do not fill hosts of 8"):
        topologies.topology_devices(gpu, 12)
    with pytest.raises(UserError, match="batch_size=15 does not divide over 2 devices"):
        parallel = compiling.parse_mesh("data=2", experiment().parallel)
        uneven = dataclasses.replace(experiment(), parallel=parallel, batch_size=15)
        Trainer(uneven, tuple(jax.devices() * 2)).mesh  # noqa: B018


def test_the_newest_result_of_a_config_is_described(cache, result):
    e, words = experiment(), ["small", "--steps", "9"]
    command = "\nnot compiled yet: engrax compile small --steps 9 --device h200\n"
    assert compile_report.saved_or_command(words, e, None) == command
    old = compiling.save(result | {"date": "2026-01-01", "rows": 4})
    new = compiling.save(result | {"mesh": {"data": 2, "fsdp": 1}, "source_digest": "another"})
    assert old != new
    (cache / "compiled" / "torn.json").write_text("{")
    for fields in ({}, {"batch_size": 2}, {"steps": 9}):
        assert compiling.newest(dataclasses.replace(e, **fields))["mesh"] == {"data": 2, "fsdp": 1}
    assert compiling.newest(e, "v5e") is None and compile_report.saved_or_command(words, e, "b200") == ""
    other = dataclasses.replace(e, model=dataclasses.replace(e.model, dim=32))
    assert compiling.newest(other) is None
    told = compile_report.saved_or_command(words, e, "cpu")
    assert "compiled for cpu, 2 devices" in told
    assert told.endswith("compile it again: engrax compile small --steps 9 --device cpu --mesh data=2,fsdp=1\n")


def test_a_current_result_is_not_compiled_again(result, tmp_path, monkeypatch, capsys):
    case, made = ("small", "cpu", "data=1", 16), []
    good = fitting(result)
    monkeypatch.setattr(compile_configs, "cases", lambda: {"a": case})
    monkeypatch.setattr(compile_configs, "experiment_of", lambda *case: experiment())
    monkeypatch.setattr(compile_configs, "compiled", lambda *case, seconds: made.append(case) or good)
    monkeypatch.setattr(topologies, "prepare", lambda: None)
    monkeypatch.setitem(compile_configs.ROWS, "cpu", 16)
    output = tmp_path / "results.json"
    words = ["compile_configs.py", "--output", str(output)]
    monkeypatch.setattr("sys.argv", words)
    compile_configs.main()
    compile_configs.main()
    assert made == [case] and list(json.loads(output.read_text())) == ["a"]
    monkeypatch.setattr(compiling, "source_digest", lambda: "another")
    compile_configs.main()
    assert made == [case, case]
    assert capsys.readouterr().out == "a: compiled, fits\n" * 3


def fitting(result):
    """A result that `make test-compile` accepts."""
    estimate = {f"{kind}_bytes": result["memory"][name] for kind, name in ESTIMATED.items()}
    memory = result["memory"] | {"fits": True}
    return result | {"config": "mqar_titans", "memory": memory, "estimate": estimate, "largest": []}


ESTIMATED = {"argument": "arguments", "temporary": "temporaries"}


def test_what_is_wrong_with_a_result(result):
    assert compile_configs.complaints({"error": "not compiled"}) == ["not compiled"]
    assert compile_configs.complaints(result) == ["it does not fit the device"]
    good = fitting(result)
    assert compile_configs.complaints(good) == []
    promised = good | {"operations": [{"op": "linear_attention", "served_by": "pallas_gpu"}]}
    assert compile_configs.complaints(promised) == ["no kernel of linear_attention is in the program"]
    tokens, length = 16 * 24, 24  # mqar_titans has 128 tokens in its vocabulary
    for dims, named in (([16, 24, 128], "vocabulary"), ([2, 16, 24, 24], "tokens"), ([16, 24, 24], "tokens")):
        assert compile_configs.complaints(good | {"largest": [{"dims": dims}]}) == [
            f"it holds an array of rows x tokens x {named}"
        ]
    assert compile_configs.complaints(good | {"largest": [{"dims": [24, 24]}, {"dims": [tokens, length]}]}) == []
    attending = {"op": "softmax_attention", "sizes": "batch=16 length=64 heads=2 groups=2", "served_by": "xla"}
    equal = good | {"seq_len": 64, "operations": [*good["operations"], attending]}  # the model has widths of 64
    for dims, wrong in (([16, 64, 64], []), ([16, 2, 64, 64], ["it holds an array of rows x tokens x tokens"])):
        assert compile_configs.complaints(equal | {"largest": [{"dims": dims}]}) == wrong
    off = good | {"estimate": {"argument_bytes": 2 * result["memory"]["arguments"], "temporary_bytes": None}}
    assert compile_configs.complaints(off) == ["the estimate of argument bytes is 2.00 times the compiler's"]


def test_what_is_held_at_once():
    """Four bytes an element: the values that live together."""
    w, x, one = jnp.zeros((16, 16)), jnp.zeros((8, 16)), 4 * 8 * 16

    def held(f, *arguments, platform="cuda"):
        return temporaries.peak(jax.make_jaxpr(f)(*arguments).jaxpr, platform)

    assert held(lambda x, w: jnp.tanh(x) * x + 1, x, w) == 0, "fused into whatever takes it"
    assert held(lambda x, w: jnp.tanh(x @ w) @ w, x, w) == 2 * one
    assert held(lambda x, w: jax.jit(lambda x: jnp.tanh(x @ w))(x) @ w, x, w) == 2 * one, "calls are inlined"
    narrow = 2 * (x.size + w.size + x.size)  # both factors and the result
    assert held(lambda x, w: (x @ w).astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), x, w) == narrow

    def loop(x, ws):  # the last x, all of them, and the product inside
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, ws)

    assert held(loop, x, jnp.zeros((5, 16, 16))) == one + 5 * one + one

    def twice(x, w):
        y = jnp.exp(x @ w)
        return jnp.sum(y) + jnp.sum(y * y)

    assert held(twice, x, w) < 2 * one <= held(twice, x, w, platform="tpu")

    def by_platform(x):
        return jax.lax.platform_dependent(x @ w, tpu=lambda y: y @ y.T @ y, default=lambda y: y + 1)

    assert held(by_platform, x) == one + 4, "the product and the index of the platform; the sum is fused"
    assert held(by_platform, x, platform="tpu") == one + 4 * 8 * 8 + one


def test_the_memory_of_a_small_step(result):
    told = cost.step_memory(experiment(), devices.NAMED["cpu"])
    assert told["argument_bytes"] == result["memory"]["arguments"] and told["temporary_bytes"] > 0
    sharded = small(parallel=ParallelConfig(data=1, fsdp=8, zero=3))
    told = cost.step_memory(sharded, devices.NAMED["cpu"], 8)
    assert told["devices"] == 8 and told["temporary_bytes"] is None
    assert told["argument_bytes"] < result["memory"]["arguments"] / 4


def test_a_librarys_kernel_has_the_name_of_the_operation():
    place = "jit(step)/while/body/grouped_matmul_transposed/jit(ragged_dot)/body/mpmd_map"
    rest = f'custom_call_target="mosaic_gpu_v2", metadata={{op_name="{place}"}}'
    instruction = program_text.Instruction("call.1", "custom-call", (), (), rest, False)
    assert program_cost._kernel_name(instruction) == "grouped_matmul_transposed"
