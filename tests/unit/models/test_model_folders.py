"""Model folders as people have them: settings of single blocks, configurations that are not those of the weights, heads of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from llmkd.errors import InputError
from llmkd.models import load, make, parts
from llmkd.models.per_block import PER_BLOCK
from llmkd.models.stored import check_stored
from llmkd.planning import doctor, memory
from llmkd.recipe.recipe import load_recipe
from llmkd.train import train
from llmkd.training import jobs
from tests.tiny import tied_in_word

SMALL: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
)  # fmt: skip
QWEN_MOE: dict[str, Any] = dict(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
DEEPSEEK: dict[str, Any] = dict(
    **{**SMALL, "num_key_value_heads": 4}, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1,
    topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
)  # fmt: skip
SLIDING = [*["full_attention"] * 5, *["sliding_attention"] * 3]
CHOSEN = (0, 3, 4, 7)
CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "mlp_only_layers": (
        lambda: hf.Qwen3MoeConfig(**QWEN_MOE, mlp_only_layers=[0, 2, 4]),
        {"mlp_only_layers": [0, 2], "decoder_sparse_step": 1},
    ),
    "decoder_sparse_step": (
        lambda: hf.Qwen3MoeConfig(**QWEN_MOE, mlp_only_layers=[3], decoder_sparse_step=2),
        {"mlp_only_layers": [0, 1, 2], "decoder_sparse_step": 1},
    ),
    "first_k_dense_replace": (
        lambda: hf.DeepseekV3Config(**DEEPSEEK, first_k_dense_replace=4),
        {"first_k_dense_replace": 2},
    ),
    "max_window_layers": (
        lambda: hf.Qwen3Config(**SMALL, head_dim=8, use_sliding_window=True, sliding_window=4, max_window_layers=5),
        {"max_window_layers": 3, "layer_types": [*["full_attention"] * 3, "sliding_attention"]},
    ),
    "no_rope_layers": (
        lambda: hf.SmolLM3Config(**SMALL, no_rope_layers=[1, 1, 1, 0, 1, 1, 1, 0], pad_token_id=0),
        {"no_rope_layers": [1, 0, 1, 0]},
    ),
    "num_dense_layers": (
        lambda: hf.Lfm2MoeConfig(
            **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, num_dense_layers=4,
            layer_types=["conv", "conv", "conv", "full_attention"] * 2,
        ),
        {"num_dense_layers": 2, "layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    ),
    "moe_layer_interval": (
        lambda: hf.Ernie4_5_MoeConfig(
            **SMALL, moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_layer_start_index=3, moe_layer_end_index=5
        ),
        {"moe_layer_start_index": 1, "moe_layer_end_index": 2, "moe_layer_interval": 1},
    ),
    "attention_types": (
        lambda: hf.GPTNeoConfig(
            vocab_size=64, hidden_size=32, num_layers=8, num_heads=4, attention_types=[[["global", "local"], 4]],
            max_position_embeddings=64,
        ),
        {"attention_layers": ["global", "local", "global", "local"]},
    ),
}  # fmt: skip


def write(config: Any, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("field", CASES)
def test_settings_of_single_blocks_follow_their_blocks(field: str, tmp_path: Path) -> None:
    """The copied student loads, each of its blocks is the teacher's, and it computes what the teacher does with these blocks alone."""
    assert field in PER_BLOCK
    config, expected = CASES[field]
    folder = write(config(), tmp_path / "teacher")
    teacher_config = load.load_config(folder)
    small = load.student_config(teacher_config, CHOSEN, {})
    load.check_copied_config(teacher_config, small, CHOSEN)
    make.copied_student(folder, CHOSEN, tmp_path / "student", dtype=torch.float32)
    options: dict[str, Any] = dict(dtype=torch.float32, ds_config=None, attention="eager")
    teacher, student = (load.load_model(path, **options) for path in (folder, tmp_path / "student"))
    for name, value in expected.items():
        assert getattr(student.config, name) == value, name
    for block, old in zip(parts.blocks(student), CHOSEN, strict=True):
        ours, theirs = block.state_dict(), parts.blocks(teacher)[old].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("field", CASES)
def test_the_first_blocks_of_a_teacher_are_built_as_in_the_whole(field: str) -> None:
    config = CASES[field][0]()
    load.check_copied_config(config, load.student_config(config, range(5), {}), range(5))


@pytest.mark.parametrize(
    ("config", "chosen", "expected"),
    [
        (CASES["first_k_dense_replace"][0], (5, 1), "the teacher's first_k_dense_replace is 4"),
        (
            lambda: hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4, scale_attn_by_inverse_layer_idx=True),
            (0, 2),
            "the teacher's scale_attn_by_inverse_layer_idx is True, so that its blocks compute by their place",
        ),
        (
            lambda: hf.JambaConfig(
                **SMALL, attn_layer_period=4, attn_layer_offset=1, num_experts=2, mamba_d_state=4, use_mamba_kernels=False
            ),
            (0, 2),
            "the teacher's block 2 would not be the same block at place 1 of the student",
        ),
    ],
    ids=["order", "place", "period"],
)  # fmt: skip
def test_settings_that_can_not_follow_their_blocks_are_refused(
    config: Any, chosen: tuple[int, ...], expected: str
) -> None:
    teacher = config()
    with pytest.raises(InputError) as caught:
        load.check_copied_config(teacher, load.student_config(teacher, chosen, {}), chosen)
    assert expected in str(caught.value)
    assert str(caught.value).startswith("student.copy_blocks: ")


@pytest.fixture
def place(tiny: Path, tmp_path: Path) -> Path:
    for name in ("rows.jsonl", "recipe.yaml"):
        (tmp_path / name).write_text((tiny / name).read_text().replace(str(tiny), str(tmp_path)))
    shutil.copytree(tiny / "teacher", tmp_path / "teacher")
    return tmp_path


def set_field(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("command", ["plan", "doctor", "train"])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"layer_types": ["full_attention"] * 7}, "`layer_types` (7)"),
        ({"layer_types": 3}, "Field 'layer_types'"),
        ({"hidden_size": "wide"}, "Field 'hidden_size'"),
        (
            {"hidden_size": 48},
            "model.embed_tokens.weight is stored as 320 x 32, and hidden_size 48",
        ),
        ({"vocab_size": 300}, "model.embed_tokens.weight is stored as 320 x 32, and vocab_size 300 makes it 300 x 32"),
        ({"vocab_size": -1}, "transformers can't make a model of its config.json"),
        (
            {"intermediate_size": 40},
            "model.layers.0.mlp.down_proj.weight is stored as 32 x 48, and intermediate_size 40 makes it 32 x 40",
        ),
        ({"num_hidden_layers": 9, "layer_types": None}, "num_hidden_layers is 9, and weights of 6 blocks are stored"),
    ],
)
def test_a_configuration_of_other_weights_is_named(
    place: Path, world: Any, command: str, fields: dict[str, Any], expected: str
) -> None:
    set_field(place / "teacher", **fields)
    refused(place, world, command, expected)


@pytest.mark.parametrize("command", ["plan", "doctor", "train"])
@pytest.mark.parametrize(
    "index", ["[]", "null", '{"weight_map": "x"}', '{"weight_map": {"a": 3}}', "{}", "not json", "\udcff"]
)
def test_a_damaged_index_is_named(place: Path, world: Any, command: str, index: str) -> None:
    file = place / "teacher" / "model.safetensors.index.json"
    file.write_bytes(index.encode(errors="surrogateescape"))
    refused(place, world, command, "model.safetensors.index.json is not whole")


def refused(place: Path, world: Any, command: str, expected: str) -> None:
    """Command's one sentence names the teacher's folder; nothing is written."""
    before = sorted(place.rglob("*"))
    recipe = load_recipe(place / "recipe.yaml")
    run: dict[str, Callable[[], object]] = {
        "plan": lambda: memory.plan(recipe, 1),
        "doctor": lambda: doctor.examine(recipe),
        "train": lambda: train(world, jobs.distil_job(world, recipe, place / "run")),
    }
    with pytest.raises(InputError) as caught:
        run[command]()
    sentence = str(caught.value)
    assert expected in sentence and str(place / "teacher") in sentence and "\n" not in sentence, sentence
    assert sorted(place.rglob("*")) == before


def test_a_list_of_another_length_is_named_by_its_field(tmp_path: Path) -> None:
    """transformers looks at the lengths of layer_types alone."""
    folder = write(CASES["no_rope_layers"][0](), tmp_path / "model")
    set_field(folder, no_rope_layers=[1, 0, 1])
    with pytest.raises(InputError, match=r"config.json has 3 entries in no_rope_layers for 8 blocks"):
        load.load_config(folder)


@pytest.fixture
def untied(tiny: Path, tmp_path: Path) -> Path:
    """A folder whose config.json ties the head to the embeddings, and which stores another head."""
    folder = Path(shutil.copytree(tiny / "tied", tmp_path / "teacher"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_head_of_its_own_is_not_tied(untied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is loaded, written and counted agrees with the configuration: another program that ties by config.json gives the same logits."""
    config = load.load_config(untied)
    assert config.tie_word_embeddings is False
    check_stored(untied, config)
    options: dict[str, Any] = dict(dtype=torch.float32, ds_config=None, attention="eager")
    model = load.load_model(untied, **options)
    stored = load_file(untied / "model.safetensors")["lm_head.weight"]
    assert torch.equal(parts.head(model).weight, stored) and torch.equal(
        load.load_head(untied, dtype=torch.float32)[0], stored
    )
    model.save_pretrained(tmp_path / "exported")
    make.copied_student(untied, (0, 2), tmp_path / "student", dtype=torch.float32)
    for folder in (tmp_path / "exported", tmp_path / "student"):
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
        assert torch.equal(load_file(folder / "model.safetensors")["lm_head.weight"], stored)


def test_a_head_that_the_files_call_otherwise_is_not_tied(tmp_path: Path) -> None:
    """GPT-NeoX's files have embed_out for what transformers calls lm_head; files of the bare model lack its prefix."""
    shape: dict[str, Any] = dict(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32
    )
    for config, rename in (
        (hf.GPTNeoXConfig(**shape, intermediate_size=24, tie_word_embeddings=False), ""),
        (hf.GPT2Config(**shape, tie_word_embeddings=False), "transformer."),
    ):
        own = tmp_path / config.model_type
        hf.AutoModelForCausalLM.from_config(config).save_pretrained(own)
        tensors = {key.removeprefix(rename): tensor for key, tensor in load_file(own / "model.safetensors").items()}
        save_file(tensors, own / "model.safetensors", metadata={"format": "pt"})
        folder = tied_in_word(own, tmp_path / f"tied-{config.model_type}")
        assert load.load_config(folder).tie_word_embeddings is False
        head, expected = (load.load_head(f, dtype=torch.float32)[0] for f in (folder, own))
        assert torch.equal(head, expected)
        model = load.load_model(folder, dtype=torch.float32, ds_config=None, attention="eager")
        assert torch.equal(parts.head(model).weight, expected)
        (name,) = {key for key, tensor in tensors.items() if torch.equal(tensor, expected)}
        tensors[name] = next(t for key, t in tensors.items() if key.endswith(("embed_in.weight", "wte.weight"))).clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        assert load.load_config(folder).tie_word_embeddings is True


def test_a_stored_head_that_is_the_embeddings_stays_tied(untied: Path) -> None:
    tensors = load_file(untied / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, untied / "model.safetensors", metadata={"format": "pt"})
    assert load.load_config(untied).tie_word_embeddings is True


def test_a_model_without_sdpa_is_run_eagerly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = hf.GptOssConfig(**SMALL, head_dim=8, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0)
    folder = write(config, tmp_path / "model")
    with caplog.at_level("INFO", "llmkd"):
        model = load.load_model(folder, dtype=torch.float32, ds_config=None, attention="auto")
    assert model.config._attn_implementation == "eager"
    assert "attention eager (transformers has no sdpa for a 'gpt_oss' model)" in caplog.text


def added_token(place: Path, text: str) -> Any:
    """The recipe with a student whose tokenizer is the teacher's with one token more, and with a row of this text."""
    student = place / "student"
    make.copied_student(place / "teacher", (0, 3), student, dtype=torch.float32)
    tokenizer = load.load_tokenizer(student)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(student)
    with (place / "rows.jsonl").open("a") as rows:
        rows.write(json.dumps({"prompt": "a ", "completion": text}) + "\n")
    changes = {"student.init": "checkpoint", "student.path": str(student), "student.blocks": None}
    return load_recipe(place / "recipe.yaml").changed(changes)


def test_a_student_with_added_tokens_is_trained_where_no_row_holds_one(place: Path, world: Any) -> None:
    recipe = added_token(place, "b")
    job = jobs.distil_job(world, recipe, place / "run")
    assert job.further_tokens == {320: "<new>"}
    train(world, job)
    assert (place / "run" / "model" / "model.safetensors").is_file()


def test_a_row_with_a_token_that_the_teacher_lacks_is_refused(place: Path, world: Any) -> None:
    recipe = added_token(place, "<new>")
    with pytest.raises(InputError, match=r"row \d+ of data.source .* token '<new>' \(id 320\) is in only one of the"):
        train(world, jobs.distil_job(world, recipe, place / "run"))
    alone = recipe.changed({"loss.kl": 0.0, "matching.strategy": "none"})  # no teacher, nothing to compare
    assert not jobs.distil_job(world, alone, place / "run").further_tokens
