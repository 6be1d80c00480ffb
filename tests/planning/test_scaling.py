"""The formulas of the scaling page against what can be counted here, and what the page promises about itself."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from atesd import cli
from atesd.config import load_config
from atesd.planning import scaling
from atesd.planning.gpu_specs import H100, H200
from atesd.planning.memory_plan import GIB, Layout, logit_bytes, plan_memory
from atesd.planning.model_shape import model_shape
from atesd.planning.time_plan import KERNEL_BYTES, layer_traffic, plan_products, plan_time, plan_traffic
from atesd_kernels import linear_divergence, linear_logprobs, ops, planning
from bench import table

PARAMETERS = {  # of the models' cards
    "Qwen3-1.7B": 1_720_574_976, "Qwen3-4B": 4_022_468_096, "Qwen3-8B": 8_190_735_360, "Qwen3-32B": 32_762_123_264,
    "Llama 3 70B": 70_553_706_496,
}  # fmt: skip
PROMPT, RESPONSE = 20, 12


@pytest.fixture
def config(tiny_config):
    """One micro-batch of two sequences of 32 tokens, all weights trained."""
    return tiny_config(
        use_peft=False, max_completion_length=RESPONSE, gradient_accumulation_steps=1, per_device_train_batch_size=2
    )


@pytest.fixture
def shape(config, tiny_model_path):
    return model_shape(AutoConfig.from_pretrained(tiny_model_path), config)


def test_the_models_have_the_parameters_of_their_cards():
    assert {model: scaling.shape_of(model, True, 64, "all-linear").parameters for model in scaling.MODELS} == PARAMETERS


def test_planned_products_are_those_torch_counts(config, shape, tiny_model_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, attn_implementation="eager")
    ids = torch.zeros(2, PROMPT + RESPONSE, dtype=torch.long)
    backbone, planned = model.get_decoder(), plan_products(shape, config, PROMPT)
    with FlopCounterMode(display=False) as forward:
        hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state
    with FlopCounterMode(display=False) as backward:
        hidden.sum().backward()
    # eager attention computes the masked half too, whose products go twice through backward
    masked = 2 * ids.shape[1] * shape.layers * 2 * shape.query * ids.shape[1]
    rotary = 2 * 2 * ids.shape[1] * (shape.query // 4 // 2)  # the angles, once for all layers
    assert forward.get_total_flops() == pytest.approx(planned.teacher + masked, abs=2 * rotary)
    both = forward.get_total_flops() + backward.get_total_flops()
    assert both == pytest.approx(planned.student + 3 * masked, abs=2 * rotary)


@pytest.fixture
def flops_of_losses(monkeypatch):
    """Counts the FLOPs of losses in float64, whose products on a CPU are torch's own: it does not know oneDNN's."""
    counter, backend = FlopCounterMode(display=False), ops._backend

    def counted(*names):
        def run(*arguments):
            with counter:  # which sees nothing of what is inside of an operator from without
                return backend(*names)(*arguments)

        return run

    monkeypatch.setattr(ops, "_backend", counted)
    return counter


def test_planned_products_of_the_loss_are_those_torch_counts(config, shape, flops_of_losses):
    rows, head = (torch.randn(n, shape.hidden, dtype=torch.float64) for n in (2 * RESPONSE, shape.vocab))
    for trained in (True, False):
        config.use_peft = not trained
        student, weight = rows.clone().requires_grad_(), head.clone().requires_grad_(trained)
        linear_divergence(student, weight, rows + 0.01, divergence="forward_kl", backend="torch").backward()
        assert flops_of_losses.get_total_flops() == plan_products(shape, config, PROMPT).loss


@pytest.mark.parametrize("trained", [True, False])
def test_references_beside_the_responses_add_a_forward_a_backward_and_a_loss(config, shape, flops_of_losses, trained):
    config.use_peft, lengths = not trained, (PROMPT, RESPONSE)
    plain = plan_products(shape, config, PROMPT, None, lengths)
    assert plain == plan_products(shape, config, PROMPT), "objective distill reads no references"
    moved, time = layer_traffic(shape, config, PROMPT), plan_time(shape, config, PROMPT, H100, Layout(4, 4))
    traffic = plan_traffic(shape, config, Layout(4, 4))
    config.objective = "sft"
    assert plan_products(shape, config, PROMPT, None, lengths) == plain, "the references are the responses"

    config.objective = "distill+sft"
    both = plan_products(shape, config, PROMPT, None, lengths)
    assert both.student == 2 * plain.student and both.teacher == plain.teacher and both.decoding == plain.decoding
    assert layer_traffic(shape, config, PROMPT, None, lengths).student == 2 * moved.student
    rows, head = (torch.randn(n, shape.hidden, dtype=torch.float64) for n in (2 * RESPONSE, shape.vocab))
    targets = torch.zeros(2 * RESPONSE, dtype=torch.long)
    linear_logprobs(rows.requires_grad_(), head.requires_grad_(trained), targets, backend="torch").sum().backward()
    assert both.loss - plain.loss == flops_of_losses.get_total_flops()

    again = plan_time(shape, config, PROMPT, H100, Layout(4, 4), None, lengths)
    assert again.student == pytest.approx(2 * time.student) and again.loss > time.loss
    assert again.teacher == time.teacher and again.rollout == time.rollout
    again = plan_traffic(shape, config, Layout(4, 4))
    assert again.scattered == 2 * traffic.scattered and 3 * again.gathered == 5 * traffic.gathered


def test_scaling_assumes_references_as_long_as_responses(monkeypatch):
    monkeypatch.setattr(scaling, "MODELS", {"Qwen3-1.7B": scaling.MODELS["Qwen3-1.7B"]})
    both, plain = (scaling.main(flags).data for flags in (["--objective", "distill+sft"], []))
    seconds = [each["models"]["Qwen3-1.7B"][1]["seconds"] for each in (both, plain)]
    assert seconds[0]["student"] == pytest.approx(2 * seconds[1]["student"]) and seconds[0]["loss"] > seconds[1]["loss"]
    said = "as long as the references that are trained on"
    assert said in both["assumptions"] and said not in plain["assumptions"]


def test_another_models_products_replace_the_teachers_own(config, shape):
    teacher = replace(shape, hidden=2 * shape.hidden, matrices=5 * shape.matrices, parameters=5 * shape.parameters)
    own, other = plan_products(shape, config, PROMPT), plan_products(shape, config, PROMPT, teacher)
    assert other.student == own.student and 4 * own.teacher < other.teacher < 5 * own.teacher
    head = 2 * 2 * RESPONSE * shape.vocab * shape.hidden
    assert other.loss - own.loss == head  # a head of twice the width
    assert (
        plan_traffic(shape, config, Layout(4, 4), teacher).gathered > plan_traffic(shape, config, Layout(4, 4)).gathered
    )
    between = layer_traffic(shape, config, PROMPT, teacher)
    assert between.student == layer_traffic(shape, config, PROMPT).student and between.teacher > between.student / 4
    slower, plain = (plan_time(shape, config, PROMPT, H100, Layout(), each) for each in (teacher, None))
    assert slower.teacher > plain.teacher and slower.loss > plain.loss and slower.student == plain.student


def test_scaling_plans_with_another_model_as_teacher(other_model_path, monkeypatch):
    monkeypatch.setattr(scaling, "MODELS", {"Qwen3-1.7B": scaling.MODELS["Qwen3-1.7B"]})
    flags = ["--teacher", "model", "--teacher_model_name_or_path", str(other_model_path)]
    given, plain = (scaling.main(each).data["models"]["Qwen3-1.7B"][1] for each in (flags, []))
    assert given["bytes"]["teacher"] > 0 == plain["bytes"]["teacher"]


def test_the_planned_loss_chunk_is_what_a_call_takes(config, shape, monkeypatch, peak_bytes):
    monkeypatch.setattr(planning, "CPU_BLOCK_COLUMNS", 50)  # to the measure of so small a vocabulary
    monkeypatch.setattr(planning, "CPU_TILE_ROWS", 25)
    config.chunk_bytes = 120_000
    rows, head = torch.randn(200, shape.hidden), torch.randn(shape.vocab, shape.hidden)

    def loss():
        student = rows.requires_grad_()
        return linear_divergence(student, head, rows.detach(), chunk_bytes=config.chunk_bytes, backend="torch")

    plan = plan_memory(shape, config, PROMPT, "cpu")
    frozen = peak_bytes(loss)
    assert 0.7 * plan.loss_chunk < frozen - rows.nbytes < 1.3 * plan.loss_chunk
    head.requires_grad_()
    assert peak_bytes(loss) - frozen == pytest.approx(plan.head_gradient, rel=0.3)


@pytest.mark.parametrize("own_head", [False, True], ids=["shared head", "teacher's own head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_planned_bytes_of_a_logit_are_those_of_the_backend_a_gpu_has(config, monkeypatch, dtype, own_head):
    class Asked(Exception):
        pass

    def asked(num_rows, vocab, bytes_per_logit, spec, device):
        raise Asked(bytes_per_logit)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if planning.unavailable("triton", device) is not None:
        pytest.skip("needs triton")
    monkeypatch.setattr("atesd_kernels.backends.triton_chunked.row_chunks", asked)
    config.torch_dtype, config.teacher = str(dtype).removeprefix("torch."), "ema" if own_head else "live"
    rows, head = (torch.zeros(n, 8, dtype=dtype, device=device, requires_grad=True) for n in (4, 50))
    with pytest.raises(Asked, match=f"^{logit_bytes(config)}$"):
        linear_divergence(rows, head, rows.detach(), head.detach().clone() if own_head else None, backend="triton")


def test_the_planned_loss_of_a_trained_head_is_what_was_measured_on_a_gpu(config, shape):
    """8,192 rows of 4,096 numbers and a vocabulary of 128,256 in bf16 took 4.99 GiB on a GPU: two chunks, and the
    head's gradient in fp32."""
    shape = replace(shape, hidden=4096, vocab=128_256)
    config.torch_dtype, config.teacher, config.max_completion_length = "bfloat16", "live", 4096
    plan = plan_memory(shape, config, PROMPT)
    assert plan.loss_chunk + plan.head_gradient == pytest.approx(4.99 * GIB, rel=0.03)
    config.max_completion_length = 1024  # one chunk, whose gradient needs no sum
    assert plan_memory(shape, config, PROMPT).head_gradient == plan.head_gradient / 2
    config.use_peft = True
    assert plan_memory(shape, config, PROMPT).head_gradient == 0


def test_the_planned_chunk_is_what_is_set_or_at_most_an_eighth_of_the_gpu(config, shape):
    wide = replace(shape, vocab=151_936)
    config.teacher, config.max_completion_length = "live", 4096
    plans = [plan_memory(wide, config, PROMPT, memory=memory) for memory in (24e9, H100.memory, None)]
    assert plans[0].loss_chunk == 3e9 < plans[1].loss_chunk == plans[2].loss_chunk < 10e9
    config.chunk_bytes = 1 << 20
    assert plan_memory(wide, config, PROMPT).loss_chunk == 1 << 20


class Collectives(TorchDispatchMode):
    """Bytes that collectives deliver whole (gathers) or take whole (reductions), by kind."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name
        if name.startswith("c10d::"):
            whole = max((t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)), key=len)
            kind = name.removeprefix("c10d::").strip("_")
            self.bytes[kind] = self.bytes.get(kind, 0) + whole.numel() * whole.element_size()
        return out


@pytest.fixture
def four_processes():
    """This one of four, whose collectives return at once: what they would carry can be counted."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield init_device_mesh("cpu", (4,))
    dist.destroy_process_group()


def test_planned_traffic_is_what_fsdp_hands_to_collectives(config, shape, tiny_model_path, four_processes):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    for layer in (*model.model.layers, model):
        fully_shard(layer, mesh=four_processes, reshard_after_forward=True)
    ids = torch.zeros(2, PROMPT + RESPONSE, dtype=torch.long)
    with Collectives() as sent:
        with torch.no_grad():
            model(ids)  # the teacher's forward
        model(ids).logits.sum().backward()
    planned = plan_traffic(shape, config, Layout(4, 4))
    kinds = {kind: size for kind, size in sent.bytes.items() if size}
    gathered = sum(size for kind, size in kinds.items() if "gather" in kind)
    scattered = sum(size for kind, size in kinds.items() if "reduce_scatter" in kind)
    assert scattered == pytest.approx(planned.scattered, rel=0.01), kinds
    assert gathered == pytest.approx(planned.gathered, rel=0.01), kinds


def test_planned_traffic_of_data_parallel_processes_is_the_gradients(config, shape, tiny_model_path, four_processes):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    reduced = []

    def count(_, bucket):
        reduced.append(bucket.buffer().numel() * bucket.buffer().element_size())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    ddp.register_comm_hook(None, count)
    ddp(torch.zeros(2, 8, dtype=torch.long)).logits.sum().backward()
    layout = Layout(processes=4)
    assert sum(reduced) == plan_traffic(shape, config, layout).reduced
    assert sum(reduced) == plan_memory(shape, config, PROMPT, "cuda", layout).communication


def test_sharded_weights_and_optimizer_are_a_quarter_on_each_of_four(config, shape, tiny_model_path, four_processes):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    fully_shard(model, mesh=four_processes)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 8, dtype=torch.long)).logits.sum().backward()
    optimizer.step()

    def local(tensors):
        return sum(t.to_local().numel() * t.element_size() for t in tensors)

    plan = plan_memory(shape, config, PROMPT, "cuda", Layout(4, 4))
    moments = [v for state in optimizer.state.values() for v in (state["exp_avg"], state["exp_avg_sq"])]
    assert plan.weights == pytest.approx(local(model.parameters()), rel=0.01)
    assert plan.gradients == pytest.approx(local(p.grad for p in model.parameters()), rel=0.01)
    assert plan.optimizer == pytest.approx(local(moments), rel=0.01)


@pytest.mark.parametrize("flags", ([], ["--no_use_peft", "--torch_dtype", "float32"]))
def test_every_prediction_fits_and_more_gpus_are_never_slower(flags):
    config = load_config(scaling.RECIPE, flags)
    for model in scaling.MODELS:
        found = [scaling.predict(model, config, gpus) for gpus in scaling.GPUS]
        fitting = [p for p in found if p is not None]
        assert fitting == found[len(found) - len(fitting) :], "what fits on few GPUs fits on more"
        for gpus, prediction in zip(scaling.GPUS[-len(fitting) :], fitting, strict=True):
            assert prediction.memory.total <= H100.of_memory * H100.memory
            assert prediction.layout.processes == gpus and gpus % prediction.layout.shards == 0
        times = [prediction.time.total for prediction in fitting]
        assert all(b <= a for a, b in pairwise(times))
        assert fitting, f"{model} fits nowhere"


def test_times_are_the_counts_over_the_device_s_speed(config, shape):
    plain = plan_time(shape, config, PROMPT, H100, Layout())
    products = plan_products(shape, config, PROMPT)
    traffic = layer_traffic(shape, config, PROMPT)
    assert plain.student == pytest.approx(products.student / (989e12 * 0.5) + traffic.student / (3.35e12 * 0.6))
    assert plain.teacher == pytest.approx(products.teacher / (989e12 * 0.5) + traffic.teacher / (3.35e12 * 0.6))
    assert plain.communication == 0
    sharded = plan_time(shape, config, PROMPT, H100, Layout(16, 16))
    traffic = plan_traffic(shape, config, Layout(16, 16))
    # sixteen GPUs are two nodes: the network's speed
    assert sharded.communication == pytest.approx(15 / 16 * (traffic.gathered + traffic.scattered) / (50e9 * 0.7))
    assert math.isclose(sharded.student, plain.student)


class Moved(TorchDispatchMode):
    """Bytes that operators other than matrix products and attention read and write. Views move nothing."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name
        if not any(
            part in name for part in ("mm", "attention", "view", "transpose", "empty", "::t", "expand", "detach")
        ):
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            if not function.is_view:
                self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


def test_planned_traffic_of_a_layer_is_what_its_kernels_move(config):
    """On a bfloat16 model, of the difference between three layers and one."""
    moved = []
    for layers in (1, 3):
        model_config = scaling.QWEN3(
            vocab_size=64, hidden_size=64, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=8,
            head_dim=16,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.bfloat16, attn_implementation="sdpa")
        with torch.no_grad(), Moved() as counted:
            model.model(torch.zeros(2, 64, dtype=torch.long), use_cache=False)
        moved.append(counted.bytes)
    config.use_peft, config.max_completion_length = False, 32
    planned = layer_traffic(model_shape(model_config, config), config, 32)
    assert (moved[1] - moved[0]) / 2 == pytest.approx(planned.teacher / 3, rel=0.1)
    assert KERNEL_BYTES["liger"] < KERNEL_BYTES["transformers"]


@pytest.mark.parametrize(
    ("liger", "teacher", "student"), [(False, 0.107, 0.311), (True, 0.084, 0.218)], ids=["transformers", "liger"]
)
def test_times_are_within_a_third_of_those_measured_on_an_h200(liger, teacher, student):
    """Qwen3-1.7B's sizes, 8 problems with 1,024 response tokens, by bench.gpu. The teacher's seconds are those of TRL's
    chunked step, which runs it second: its launches were ahead of the GPU."""
    config = load_config("opsd-qwen3-1.7b", [])
    config.use_liger_kernel, config.gradient_checkpointing, config.max_completion_length = liger, False, 1024
    config.per_device_train_batch_size, config.gradient_accumulation_steps = 8, 1
    shape = model_shape(scaling.MODELS["Qwen3-1.7B"](), config)
    plans = [plan_time(shape, config, prompt, H200, Layout()) for prompt in (512, 128)]
    assert plans[0].teacher == pytest.approx(teacher, rel=0.33)
    assert plans[1].student == pytest.approx(student, rel=0.33)


def test_the_command_says_that_nothing_was_measured(capsys):
    assert cli.main(["scaling", "--lora_r", "8"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(scaling.LABEL) and text.count(scaling.LABEL) == 2 and "LoRA of rank 8" in text
    assert all(model in text for model in scaling.MODELS)


def test_the_readme_s_table_is_what_the_command_prints():
    page = table.PAGES[1].read_text(encoding="utf-8")
    (found,) = (match for match in table.MARKED.finditer(page) if match["name"] == "predicted_scaling")
    assert found["body"] == table.predicted_scaling() + "\n"
    assert scaling.overview(load_config(scaling.RECIPE, [])) in found["body"]
