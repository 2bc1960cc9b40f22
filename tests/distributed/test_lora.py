"""Adapters through a run: what checkpoints hold of them, resuming, export."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config

from llmkd import train as loop
from llmkd.cli import main
from llmkd.data.batches import Family
from llmkd.distributed.engines import gathered
from llmkd.errors import InputError
from llmkd.inference.vllm_setup import vllm_version
from llmkd.models import make as making
from llmkd.models.adapter_folders import write_merged
from llmkd.models.load import load_config, load_tokenizer
from llmkd.models.lora import adapt
from llmkd.planning.run_checks import check_trained
from llmkd.processes import Stopping
from llmkd.recipe.recipe import load_recipe
from llmkd.rollouts.weights import InFolder
from llmkd.rollouts.writer import Asked, HuggingFaceWriter, Writing, writer_of
from llmkd.train import train
from llmkd.training import checkpoint, jobs, prepare
from tests.distributed.runner import run_on_ranks
from tests.tiny import assert_same_weights, plain_run

LORA = {"rank": 2, "alpha": 4}
OPTIONS = {
    "student.lora": LORA,
    "matching.projector": "always",
    "train.steps": 4,
    "train.save_every": 2,
    "train.micro_batch_size": 4,
}
OF_A_BLOCK = (32 + 32) + 2 * (32 + 16) + (32 + 32) + 3 * (32 + 48)  # q, k and v, o, the MLP's: inputs + outputs
TRAINED = 3 * 2 * OF_A_BLOCK + 3 * 32 * 32
"""Numbers of the adapters in three blocks, and of three projectors."""


@pytest.fixture(scope="module")
def on_two(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Whole runs on two ranks, and their recipes' changes."""
    scenarios = {
        "sharded": OPTIONS,
        "dropout": {**OPTIONS, "student.lora": {**LORA, "dropout": 0.2}, "train.deepspeed": str(tiny / "zero1.json")},
    }
    folder = tmp_path_factory.mktemp("on-two")
    assert run_on_ranks(2, tiny / "recipe.yaml", scenarios, folder) == {}
    return folder, scenarios


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def _begun(run: Path, folder: Path) -> None:
    """A copy of a run as it was after its first checkpoint, the folder that it began from lost."""
    shutil.copytree(run / "checkpoints" / "step-00000002", folder / "checkpoints" / "step-00000002")


@pytest.mark.parametrize("name", ["sharded", "dropout"])
def test_a_checkpoint_holds_what_is_trained_and_its_optimizer_alone(on_two: Any, name: str) -> None:
    shards = on_two[0] / name / "checkpoints" / "step-00000004" / checkpoint.TAG
    states = [torch.load(file, weights_only=False) for file in sorted(shards.glob("*_model_states.pt"))]
    names = {key for state in states for key in state["module"]}
    assert names and all("lora_" in key or key.startswith("projectors.") for key in names)
    assert not any(state.get("frozen_param_fragments") for state in states)
    optimizers = [torch.load(file, weights_only=False) for file in sorted(shards.glob("*_optim_states.pt"))]
    assert len(optimizers) == 2
    for moment in ("exp_avg", "exp_avg_sq"):
        count = sum(_numbers(optimizer["optimizer_state_dict"], moment) for optimizer in optimizers)
        assert TRAINED <= count <= 1.01 * TRAINED  # shards are padded


def _numbers(state: Any, key: str) -> int:
    """How many numbers the tensors of this name have, however deep they lie."""
    if isinstance(state, dict):
        here = state.get(key)
        own = here.numel() if isinstance(here, torch.Tensor) else 0
        return own + sum(_numbers(value, key) for value in state.values())
    return sum(_numbers(value, key) for value in state) if isinstance(state, list | tuple) else 0


def test_resumed_is_uninterrupted_to_the_bit(on_two: Any, tiny: Path, tmp_path: Path) -> None:
    folder, scenarios = on_two
    for name in scenarios:
        _begun(folder / name, tmp_path / name)
    assert run_on_ranks(2, tiny / "recipe.yaml", scenarios, tmp_path) == {}
    for name in scenarios:
        assert "step-00000004" in {path.name for path in (tmp_path / name / "checkpoints").iterdir()}
        ours, theirs = _weights(tmp_path / name), _weights(folder / name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert not (tmp_path / name / "initial").exists()


def test_resumed_on_another_number_of_ranks(on_two: Any, tiny: Path, world: Any, tmp_path: Path) -> None:
    _begun(on_two[0] / "sharded", tmp_path / "run")
    recipe = load_recipe(tiny / "recipe.yaml").changed(OPTIONS)
    assert train(world, jobs.distil_job(world, recipe, tmp_path / "run"))
    assert_same_weights(_weights(tmp_path / "run"), _weights(on_two[0] / "sharded"), 1e-6)


@pytest.mark.slow
def test_every_stage_is_resumed_on_another_number_of_ranks(tiny: Path, tmp_path: Path) -> None:
    """A broader matrix of the fast test above."""
    scenarios = {
        f"{stage}-{dtype}": {**OPTIONS, "train.deepspeed": str(tiny / f"zero{stage}.json"), "train.dtype": dtype}
        for stage in range(4)
        for dtype in ("float32", "bfloat16")
        if (stage, dtype) != (0, "bfloat16")  # which is refused
    }
    assert run_on_ranks(2, tiny / "recipe.yaml", scenarios, tmp_path / "two") == {}
    for name in scenarios:
        _begun(tmp_path / "two" / name, tmp_path / "one" / name)
    assert run_on_ranks(1, tiny / "recipe.yaml", scenarios, tmp_path / "one") == {}
    for name in scenarios:
        tolerance = 1e-6 if name.endswith("float32") else 2**-7
        assert_same_weights(_weights(tmp_path / "one" / name), _weights(tmp_path / "two" / name), tolerance)


def test_stopped_and_exported(tiny: Path, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stopped run goes on from stays; the exported model gives the logits that the student gave, without peft's names."""
    recipe = load_recipe(tiny / "recipe.yaml").changed({**OPTIONS, "student.lora": {**LORA, "dora": True}})
    job = jobs.distil_job(world, recipe, tmp_path / "run")
    stopping = Stopping()

    def prepared(*args: Any) -> Any:
        run = prepare.prepare(*args)
        stopping.asked = True
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "prepare", prepared)
        assert not train(world, job, stopping)
    frozen = tmp_path / "run" / "initial" / "model.safetensors"
    began = load_file(frozen)
    written = frozen.read_bytes()
    frozen.unlink()  # `began` reads on from the file
    frozen.write_bytes(written[:-1] + bytes([written[-1] ^ 1]))  # no checkpoint has these weights
    with pytest.raises(
        InputError, match=r"run/initial: model\.safetensors is damaged: .*; put it back, or remove that folder"
    ):
        train(world, job)
    shutil.rmtree(tmp_path / "run" / "initial")

    ids = torch.arange(4, 36).reshape(2, 16)
    seen: list[torch.Tensor] = []
    export = checkpoint.export

    def watched(world: Any, model: Any, *args: Any, **options: Any) -> None:
        with torch.no_grad(), gathered(list(model.parameters())):
            seen.append(model.eval()(input_ids=ids).logits)
        export(world, model, *args, **options)

    monkeypatch.setattr(checkpoint, "export", watched)
    assert train(world, job)
    assert not (tmp_path / "run" / "initial").exists()
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert (logits - seen[0]).norm() < 1e-5 * logits.norm()
    weights = _weights(tmp_path / "run")
    assert weights.keys() == began.keys()
    for name, before in began.items():
        change = (weights[name] - before).abs().max()
        assert change > 1e-5 if "_proj" in name else change == 0, name


def _logits(base: Path, adapter: Path | None = None) -> torch.Tensor:
    """What plain transformers, or peft with these adapters on it, makes of some tokens."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = model if adapter is None else peft.PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(4, 36).reshape(2, 16)).logits


def test_exported_beside_the_merged_model(tiny: Path, world: Any, tmp_path: Path) -> None:
    """The adapters on what the run began from, which stays, give the merged model's logits."""
    lora = {**LORA, "dora": True, "rslora": True, "dropout": 0.1, "export": "both"}
    recipe = load_recipe(tiny / "recipe.yaml").changed({**OPTIONS, "student.lora": lora})
    assert train(world, jobs.distil_job(world, recipe, tmp_path / "run"))
    model, base = tmp_path / "run" / "model", tmp_path / "run" / "initial"
    merged, apart = _logits(model), _logits(base, model / "adapter")
    assert (merged - apart).norm() < 1e-5 * merged.norm() < 1e-2 * (merged - _logits(base)).norm()
    assert json.loads((model / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    write_merged(base, str(model / "adapter"), tmp_path / "again", key="student.adapter", dtype=torch.float32)
    assert_same_weights(load_file(tmp_path / "again" / "model.safetensors"), _weights(tmp_path / "run"), 1e-6)


def test_exported_alone_with_the_best_student(
    tiny: Path, world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a checkpoint nothing but adapters is written; they are those of the student that is kept."""
    own = load_recipe(tiny / "recipe.yaml")
    start = {"student.init": "checkpoint", "student.path": str(tiny / "teacher"), "student.blocks": None}
    held_out = {"data.validation": {"share": 0.2}, "train.validate_every": 1, "train.learning_rate": 0.5}
    held_out |= {"train.clip": 0, "train.schedule": "constant", "train.final_learning_rate": 0.0}
    recipe = own.changed({**start, **held_out, "student.lora": {**LORA, "export": "both"}, "train.keep": "best"})
    alone = recipe.changed({"student.lora.export": "adapter"})
    for name, changed in (("both", recipe), ("alone", alone)):
        assert train(world, jobs.distil_job(world, changed, tmp_path / name))
        assert not (tmp_path / name / "initial").exists()
    model = tmp_path / "alone" / "model"
    assert not list(model.glob("*.safetensors")) and not (model / "config.json").exists()
    assert (model / "tokenizer.json").is_file() and jobs.is_finished(tmp_path / "alone")
    expected = _logits(tmp_path / "both" / "model")
    card = (tmp_path / "both" / "model" / "README.md").read_text()
    assert (
        f"- trained: adapters of rank {LORA['rank']} alone\n" in card
        and f"- started from: {tiny / 'teacher'}\n" in card
    )
    assert (_logits(tiny / "teacher", model / "adapter") - expected).norm() < 1e-5 * expected.norm()
    for command in (["generate", str(model)], ["evaluate", str(model)]):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(command)
        sentence = capsys.readouterr().err
        assert caught.value.code == 2 and "holds adapters alone, and no model that they are added to" in sentence
        assert "student.lora.export: both or merged" in sentence and "peft's merge_and_unload" in sentence


@pytest.mark.slow  # an engine starts
@pytest.mark.skipif(vllm_version() is None, reason="vLLM is not installed")
def test_an_exported_student_writes_the_same_by_vllm(tiny: Path, world: Any, tmp_path: Path) -> None:
    """Merged alone, and beside its adapters; its texts are those of Hugging Face, and not those of the model that it began from."""
    tokenizer = load_tokenizer(tiny / "teacher")
    heads = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=32)  # which vLLM's CPU build has
    config = Qwen3Config(**{**load_config(tiny / "teacher").to_dict(), **heads, "layer_types": None, "hidden_size": 64})
    teacher = tmp_path / "teacher"
    making.new_model(config, teacher, seed=3, dtype=torch.float32, tokenizer=tokenizer.save_pretrained)
    recipe = load_recipe(tiny / "recipe.yaml").changed({**OPTIONS, "teacher.path": str(teacher), "student.lora": LORA})
    recipe = recipe.changed({"train.learning_rate": 0.1, "train.clip": 0})
    how = Writing("vllm", "float32", 16, 64, (tokenizer.eos_token_id,), 0.0, 1.0, 4, trust_remote_code=False)
    prompts = [tokenizer(text)["input_ids"] for text in ("red stone", "green tree old river", "wind")]
    by_vllm = writer_of(how, tmp_path / "writer.log", {})

    def by_hugging_face(folder: Path) -> list[list[int]]:
        return HuggingFaceWriter(replace(how, backend="hf")).write(asked(folder))

    def asked(folder: Path) -> Asked:
        return Asked(str(folder), prompts, [16] * 3, [0, 1, 2])

    for form in ("merged", "both"):
        run = tmp_path / form
        changed = recipe.changed({"student.lora.export": form, "train.save_every": 0})
        assert train(world, jobs.distil_job(world, changed, run))
        assert (run / "model" / "adapter").is_dir() == (form == "both")
        texts = by_hugging_face(run / "model")
        assert by_vllm.write(asked(run / "model")) == texts and any(texts)
    by_vllm.close()
    assert by_hugging_face(run / "initial") != texts


def test_trained_adapters_switched_off_are_the_base_model(
    tiny: Path, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trained model itself, before it is written out: what is frozen beside adapters has not moved."""
    export, found = checkpoint.export, {}

    def switched(world: Any, model: Any, folder: Path, **options: Any) -> None:
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        for on in (False, True):
            for layer in layers:
                layer.enable_adapters(on)
            with torch.no_grad():
                found[on] = model.eval()(input_ids=torch.arange(4, 36).reshape(2, 16)).logits
        export(world, model, folder, **options)

    monkeypatch.setattr(checkpoint, "export", switched)
    changes = {"student.lora": {**LORA, "export": "both"}, "train.deepspeed": str(tiny / "zero1.json")}
    recipe = load_recipe(tiny / "recipe.yaml").changed({**OPTIONS, **changes, "train.learning_rate": 0.1})
    assert train(world, jobs.distil_job(world, recipe, tmp_path / "run"))
    before, after = _logits(tmp_path / "run" / "initial"), _logits(tmp_path / "run" / "model")
    assert torch.equal(found[False], before)
    assert (found[True] - after).norm() < 1e-5 * after.norm() < 1e-2 * (found[True] - before).norm()


def test_a_writer_in_another_process_reads_the_sum(tiny: Path, world: Any, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny / "teacher", dtype=torch.float32).eval()
    adapt(model, rank=2, alpha=4.0, dropout=0.0, targets="all_linear", rslora=False, dora=False, seed=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    with torch.no_grad():
        expected = model(input_ids=torch.arange(4, 36).reshape(2, 16)).logits
    with InFolder(model, tmp_path).handed_over(world) as folder:
        assert (_logits(folder) - expected).norm() < 1e-5 * expected.norm()
    assert (_logits(tiny / "teacher") - expected).norm() > 1e-2 * expected.norm()


def test_no_study_scores_adapters_alone(tiny: Path) -> None:
    shape = load_config(tiny / "teacher")
    recipe = load_recipe(tiny / "recipe.yaml").changed({"student.lora": {**LORA, "export": "both"}})
    check_trained(recipe, Family("decoder"), shape, 1)
    with pytest.raises(InputError, match=r"student\.lora\.export: a study scores plain models.*; write both or merged"):
        check_trained(recipe.changed({"student.lora.export": "adapter"}), Family("decoder"), shape, 1)


def test_a_teacher_tuned_by_adapters(tiny: Path, world: Any, tmp_path: Path) -> None:
    """Its exported weights are those of plain PyTorch and peft, merged; embeddings and head are the start's, to the bit."""
    start, own = tiny / "teacher", load_recipe(tiny / "recipe.yaml")
    lora = {**LORA, "targets": ["q_proj", "up_proj"], "rslora": True}
    tuned = {"path": str(start), "lora": lora, "train": own.train.model_dump(mode="json"), "seed": 5}
    recipe = own.changed({"teacher.path": None, "finetune": tuned})
    assert train(world, jobs.finetune_job(world, recipe, tmp_path / "teacher"))

    alone = {"matching.strategy": "none", "loss.kl": 0.0, "loss.hidden": 0.0, "student.lora": lora, "seed": 5}
    alone |= {"student.init": "checkpoint", "student.path": str(start), "student.blocks": None}
    expected, _ = plain_run(own.changed(alone), start, start)
    weights = _weights(tmp_path / "teacher")
    assert_same_weights(weights, expected, 1e-5)
    before = load_file(start / "model.safetensors")
    changed = {name for name in before if not torch.equal(weights[name], before[name])}
    assert changed == {name for name in before if "q_proj" in name or "up_proj" in name}


def test_optimizer_has_states_of_adapters_alone(tiny: Path, world: Any, tmp_path: Path) -> None:
    recipe = load_recipe(tiny / "recipe.yaml").changed({**OPTIONS, "train.deepspeed": str(tiny / "zero0.json")})
    run = prepare.prepare(world, jobs.distil_job(world, recipe, tmp_path / "run"))
    groups = run.engine.optimizer.param_groups
    assert sum(p.numel() for group in groups for p in group["params"]) == TRAINED
