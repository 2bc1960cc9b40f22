"""Models of several classes: their blocks are found, their head gives their logits, students are cut and loaded whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llmkd.data.batches import collate
from llmkd.distributed.ds_configs import teacher_ds_config
from llmkd.distributed.engines import gathered
from llmkd.errors import InputError
from llmkd.models import folders as model_folders
from llmkd.models import load, parts
from llmkd.models import make as making
from llmkd.models.model_types import types_with
from llmkd.models.parts import output_state
from llmkd.models.vocabularies import check_rows, check_same_tokens
from llmkd.recipe.recipe import load_recipe

SMALL: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.3,
    bos_token_id=None,
    eos_token_id=1,
    pad_token_id=0,
)
ALL_HEADS = {**SMALL, "num_key_value_heads": 4}
CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen3": lambda: hf.Qwen3Config(**SMALL, head_dim=8),
    "qwen2": lambda: hf.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "llama": lambda: hf.LlamaConfig(**SMALL),
    "mistral": lambda: hf.MistralConfig(**SMALL),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
    "olmo2": lambda: hf.Olmo2Config(**SMALL),
    "phi": lambda: hf.PhiConfig(**ALL_HEADS),
    "phi3": lambda: hf.Phi3Config(**SMALL),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "smollm3": lambda: hf.SmolLM3Config(**SMALL, no_rope_layers=[1, 0, 1, 1]),
    "stablelm": lambda: hf.StableLmConfig(**ALL_HEADS),
    "gemma": lambda: hf.GemmaConfig(**SMALL, head_dim=8),
    "gemma3_text": lambda: hf.Gemma3TextConfig(**SMALL, head_dim=8),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=64,
        n_positions=64,
        n_embd=32,
        n_layer=4,
        n_head=4,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=1,
    ),
    "opt": lambda: hf.OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        init_std=0.3,
        bos_token_id=1,
        eos_token_id=1,
    ),
}
FINAL_NORM = {"gpt_neox": "final_layer_norm", "phi": "final_layernorm", "gpt2": "ln_f", "opt": "final_layer_norm"}


def new(config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():  # norms and biases too, so that leaving one out is seen
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a configuration -> a folder of such a model, with a tokenizer."""
    base = tmp_path_factory.mktemp("models")
    tokenizer = making.new_tokenizer(["one two"], 300)

    def folder(kind: str) -> Path:
        if not (base / kind).is_dir():
            new(CONFIGS[kind]()).save_pretrained(base / kind)
            tokenizer.save_pretrained(base / kind)
        return base / kind

    return folder


def variant(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


# ---------------------------------------------------------------------------------------------------------------------
# Finding things


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_blocks_and_head_are_those_of_the_model(kind: str) -> None:
    """No index can be off by one: each block's output is the next hidden state, the norm of the last one gives the logits."""
    model = new(CONFIGS[kind]())
    stack, outputs = parts.blocks(model), {}
    assert len(stack) == 4
    for number, block in enumerate(stack):
        block.register_forward_hook(lambda module, args, output, n=number: outputs.update({n: output_state(output)}))
    ids = torch.randint(2, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    whole = model(input_ids=ids, output_hidden_states=True)
    for number in range(3):
        torch.testing.assert_close(outputs[number], whole.hidden_states[number + 1])
        assert (outputs[number] - whole.hidden_states[number]).abs().max() > 0.01
    body = parts.backbone(model)
    norm = getattr(body, FINAL_NORM.get(kind, "norm"))
    final = body(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(norm(outputs[3]), final)
    torch.testing.assert_close(parts.head(model)(final), whole.logits)
    assert (norm(outputs[2]) - final).abs().max() > 0.01


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (lambda: hf.Gemma2Config(**SMALL, head_dim=8), "final_logit_softcapping"),
        (lambda: hf.CohereConfig(**SMALL), "logit_scale"),
        (lambda: hf.GraniteConfig(**SMALL, logits_scaling=8.0), "logits_scaling"),
    ],
)
def test_model_that_changes_its_logits_after_the_head_is_refused(config: Callable[[], Any], key: str) -> None:
    with pytest.raises(
        InputError, match=rf"changes its logits after the head \({key}\), which is not supported yet; give"
    ):
        parts.head(new(config()))
    with pytest.raises(InputError, match=rf"changes its logits after the head \({key}\)"):
        load.check_usable(config(), section="teacher", attention="auto", packed=False)


@torch.no_grad()
def test_each_model_that_may_be_packed_keeps_documents_apart() -> None:
    draw = torch.Generator().manual_seed(1)
    rows = [
        {"input_ids": torch.randint(2, 64, (n,), generator=draw).tolist(), "trained": [True] * n} for n in (5, 1, 9)
    ]
    batch = collate(rows, pad_id=0, packed=True)
    for kind in types_with(lambda row: row.packs):
        config = CONFIGS[kind]()
        load.check_usable(config, section="teacher", attention="auto", packed=True)
        model = new(config)
        alone = torch.cat([model(torch.tensor([row["input_ids"]])).logits[0] for row in rows])
        body = parts.backbone(model)
        final = body(input_ids=batch.input_ids, attention_mask=None, position_ids=batch.position_ids, use_cache=False)
        together = parts.head(model)(final.last_hidden_state)[0]
        torch.testing.assert_close(together, alone, rtol=0, atol=5e-5, msg=lambda text, kind=kind: f"{kind}: {text}")


def test_model_that_has_not_been_shown_to_keep_documents_apart_is_refused() -> None:
    """OPT counts positions by itself: its packed documents do see each other."""
    with pytest.raises(
        InputError, match=r"data\.batching: packed rows of a 'opt' model might see each other; write grouped"
    ):
        load.check_usable(CONFIGS["opt"](), section="teacher", attention="auto", packed=True)
    load.check_usable(CONFIGS["opt"](), section="teacher", attention="auto", packed=False)


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def _refusal(path: Path | str) -> str:
    with pytest.raises(InputError) as caught:
        model_folders.resolve(str(path), "teacher.path")
    sentence = str(caught.value)
    assert sentence.startswith("teacher.path: ") and "\n" not in sentence
    return sentence


def test_folders_that_hold_no_whole_model(folders: Callable[[str], Path], tmp_path: Path) -> None:
    whole = folders("qwen3")
    assert model_folders.resolve(str(whole), "teacher.path") == whole
    assert "no folder '/nowhere/model'; give an HF model folder or a hub name" in _refusal("/nowhere/model")
    assert "no folder './model'" in _refusal("./model")
    assert "no folder 'model'" in _refusal("model")
    assert _refusal("runs/minilm/model").endswith("; python scripts/fetch_minilm.py fetches it")
    assert "fetch" not in _refusal("runs/mine/model")
    assert "the hub did not give it (" in _refusal("no-one/nothing") and "local HF folder" in _refusal("no-one/nothing")
    (tmp_path / "empty").mkdir()
    assert "holds no config.json; give a folder written by save_pretrained" in _refusal(tmp_path / "empty")
    pointer = variant(whole, tmp_path / "pointer")
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n")
    assert "model.safetensors is not whole (" in _refusal(pointer) and "copy the model again" in _refusal(pointer)
    cut = variant(whole, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes()[:-100])
    assert "model.safetensors is not whole (" in _refusal(cut)
    missing = variant(whole, tmp_path / "missing")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (missing / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors is not whole (" in _refusal(missing)
    (missing / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json is not whole (" in _refusal(missing)


class _Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


def test_no_pickle_is_ever_loaded(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = variant(folders("qwen3"), tmp_path / "model")
    torch.save({"model.embed_tokens.weight": _Bomb(tmp_path / "exploded")}, folder / "pytorch_model.bin")
    load.load_causal_lm(folder, dtype=torch.float32, ds_config=None, attention="sdpa")
    making.copied_student(folder, [0], tmp_path / "student", dtype=torch.float32)
    assert not (tmp_path / "student" / "pytorch_model.bin").exists()
    (folder / "model.safetensors").unlink()
    assert "holds no .safetensors file; convert it (pickled weights are never loaded)" in _refusal(folder)
    with pytest.raises(InputError, match="can't be loaded"):
        load.load_causal_lm(folder, dtype=torch.float32, ds_config=None, attention="sdpa")
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(FileExistsError):  # the bomb does work
        (tmp_path / "exploded").mkdir()
        monkeypatch.delenv(
            "TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False
        )  # llmkd.distributed.unpickling forbids what follows
        torch.load(folder / "pytorch_model.bin", weights_only=False)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("{oops", "transformers can't read this model (It looks like the config file at"),
        (
            '{"model_type": "nope"}',
            "transformers can't read this model (The checkpoint you are trying to load has model type",
        ),
        ('{"model_type": "gemma3"}', "a model of type 'gemma3' is more than a causal language model; give one of text"),
        ('{"model_type": "x", "auto_map": {"AutoConfig": "evil.Config"}}', "transformers can't read this model ("),
    ],
)
def test_configurations_that_cannot_be_read(tmp_path: Path, config: str, expected: str) -> None:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(InputError) as caught:
        load.load_config(tmp_path)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_folder_without_a_tokenizer_is_refused(folders: Callable[[str], Path], tmp_path: Path) -> None:
    """transformers makes an empty tokenizer of such a folder, which reads every text as nothing."""
    bare = variant(folders("qwen3"), tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(
        InputError, match="its tokenizer has no vocabulary; copy the model's tokenizer files into the folder"
    ):
        load.load_tokenizer(bare)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no tokenizer that transformers can read"):
        load.load_tokenizer(tmp_path / "empty")
    assert len(load.load_tokenizer(folders("qwen3"))) > 250


def test_tokenizers_must_agree_on_every_id() -> None:
    texts = ["one two three four"]
    tokenizer, same, longer = (making.new_tokenizer(texts, size) for size in (266, 266, 267))
    assert check_same_tokens(tokenizer, same) == {}
    [first] = longer.get_vocab().keys() - tokenizer.get_vocab().keys()
    assert check_same_tokens(tokenizer, longer) == check_same_tokens(longer, tokenizer) == {266: first}
    same.add_tokens(["<extra>"])  # as Qwen3 adds four to Qwen2.5
    assert check_same_tokens(tokenizer, same) == {266: "<extra>"}
    with pytest.raises(InputError) as caught:
        check_same_tokens(longer, same)
    assert f"first at token {first!r} (id 266): teacher id 266, student id None" in str(caught.value)
    assert "use a student with the teacher's tokenizer" in str(caught.value)


def test_rows_hold_only_tokens_that_both_have() -> None:
    rows = Dataset.from_dict({"input_ids": [[1, 2], [3], [2, 266, 1]], "trained": [[False], [True], [True]]})
    check_rows(rows, {}, "rows.jsonl")
    check_rows(rows, {267: "<other>"}, "rows.jsonl")
    check_rows(rows.filter(lambda row: 266 not in row["input_ids"]), {266: "<extra>"}, "rows.jsonl")
    with pytest.raises(
        InputError, match=r"^row 2 of rows.jsonl: token '<extra>' \(id 266\) is in only one of the teach"
    ):
        check_rows(rows, {266: "<extra>"}, "rows.jsonl")


# ---------------------------------------------------------------------------------------------------------------------
# Making students


def test_the_papers_lists_that_are_not_spread_are_written_out() -> None:
    """docs/papers.md and recipes/qwen3_14b_to_10_blocks.yaml say so."""
    lists = {(7, 28): (0, 4, 9, 13, 18, 22, 27), (10, 40): (0, 4, 9, 13, 18, 22, 27, 31, 35, 39)}
    for depths, blocks in lists.items():
        assert making.block_choice("spread", *depths) != blocks == making.block_choice(blocks, *depths)
    assert load_recipe("qwen3_14b_to_10_blocks").student.copy_blocks == lists[10, 40]


@pytest.mark.parametrize(
    ("rule", "student", "teacher", "expected"),
    [
        ("spread", 9, 36, (0, 4, 9, 13, 18, 22, 27, 31, 35)),  # the layer-selection paper's lists
        ("spread", 3, 12, (0, 6, 11)),
        ("spread", 6, 12, (0, 2, 4, 7, 9, 11)),
        ("spread", 1, 12, (0,)),
        ("spread", 2, 12, (0, 11)),
        ("matched", 9, 36, (3, 7, 11, 15, 19, 23, 27, 31, 35)),
        ("matched", 3, 12, (3, 7, 11)),
        ((2, 2, 0), 3, 6, (2, 2, 0)),
    ],
)
def test_block_choice(rule: Any, student: int, teacher: int, expected: tuple[int, ...]) -> None:
    assert making.block_choice(rule, student, teacher) == expected


@pytest.mark.parametrize("rule", ["spread", "matched"])
def test_block_choice_is_of_distinct_blocks_in_order_at_any_depths(rule: str) -> None:
    for teacher in range(1, 41):
        assert making.block_choice(rule, teacher, teacher) == tuple(range(teacher))
        for student in range(1, teacher + 1):
            chosen = making.block_choice(rule, student, teacher)
            assert len(chosen) == student and all(a < b for a, b in pairwise(chosen)) and chosen[-1] < teacher


def test_block_choice_refuses() -> None:
    with pytest.raises(
        InputError, match=r"student\.blocks: 7 blocks can't be copied from a teacher of 6; write at most 6"
    ):
        making.block_choice("spread", 7, 6)
    for block in (6, -1):
        with pytest.raises(
            InputError, match=rf"student\.copy_blocks: {block} is not a block of the teacher \(0 to 5\)"
        ):
            making.block_choice((0, block), 2, 6)


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "gpt2", "gpt_neox", "opt", "qwen3_moe", "smollm3", "gemma3_text"])
@torch.no_grad()
def test_copied_student_is_the_chosen_blocks_of_its_teacher(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(making, "SHARD_BYTES", 12_000)  # several files
    chosen = (3, 1, 1)
    making.copied_student(folders(kind), chosen, tmp_path / "student", dtype=torch.float32)
    assert len(list((tmp_path / "student").glob("model-*-of-*.safetensors"))) > 2
    teacher, student = (
        load.load_causal_lm(folder, dtype=torch.float32, ds_config=None, attention="sdpa")
        for folder in (folders(kind), tmp_path / "student")
    )
    ours, theirs = parts.blocks(student), parts.blocks(teacher)
    assert student.config.num_hidden_layers == len(ours) == 3
    for new_block, old in zip(ours, chosen, strict=True):
        for name, tensor in theirs[old].state_dict().items():
            assert torch.equal(new_block.state_dict()[name], tensor), name
    outside = [n for n in teacher.state_dict() if not any(f".{b}." in n for b in range(4))]
    assert len(outside) >= 3 and all(torch.equal(student.state_dict()[n], teacher.state_dict()[n]) for n in outside)
    own_head: Any = student.get_output_embeddings()
    tied = own_head.weight is student.get_input_embeddings().weight
    assert tied == teacher.config.tie_word_embeddings == student.config.tie_word_embeddings
    # And what it computes is what the teacher does with its blocks rearranged.
    if kind != "smollm3":  # whose blocks know their own number
        stack = parts.blocks(teacher)
        rearranged = torch.nn.ModuleList(stack[old] for old in chosen)
        holder = next(m for m in parts.backbone(teacher).modules() if any(child is stack for child in m.children()))
        setattr(holder, next(name for name, child in holder.named_children() if child is stack), rearranged)
        teacher.config.num_hidden_layers = 3
        ids = torch.arange(2, 12)[None]
        torch.testing.assert_close(student.eval()(ids).logits, teacher.eval()(ids, use_cache=False).logits)


def test_settings_of_blocks_follow_their_blocks() -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    teacher = hf.Qwen3Config(**SMALL, head_dim=8, layer_types=kinds, use_sliding_window=True, sliding_window=8)
    small = load.student_config(teacher, (1, 2, 3), {})
    assert small.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    assert teacher.layer_types == kinds and teacher.num_hidden_layers == 4
    small = load.student_config(CONFIGS["smollm3"](), (1, 1), {})
    assert small.no_rope_layers == [0, 0]


def test_copied_student_takes_the_tokenizer_and_no_other_papers(folders: Callable[[str], Path], tmp_path: Path) -> None:
    teacher = variant(folders("qwen3"), tmp_path / "teacher")
    for name in ("llmkd.json", "adapter_config.json", "README.md", "training_args.bin"):
        (teacher / name).write_text("{}")
    (teacher / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (teacher / "chat_template.jinja").write_text("{{ messages }}")
    making.copied_student(teacher, (0, 3), tmp_path / "student", dtype=torch.bfloat16)
    names = {file.name for file in (tmp_path / "student").iterdir()}
    assert names == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
    }  # fmt: skip
    assert hf.GenerationConfig.from_pretrained(tmp_path / "student").eos_token_id == [1, 2]
    assert hf.AutoConfig.from_pretrained(tmp_path / "student").dtype == torch.bfloat16
    with safe_open(tmp_path / "student" / "model.safetensors", framework="pt") as tensors:
        assert {str(tensors.get_slice(name).get_dtype()) for name in tensors.keys()} == {"BF16"}  # noqa: SIM118
    assert not list(tmp_path.glob("*.tmp"))


def test_copied_files_are_for_whom_the_umask_says(tmp_path: Path) -> None:
    """Whatever the permissions of the teacher's files: readable for all, or for reading alone."""
    source, copies = tmp_path / "source", tmp_path / "copies"
    source.mkdir()
    copies.mkdir()
    for name, mode in (("tokenizer.json", 0o644), ("chat_template.jinja", 0o444), ("generation_config.json", 0o666)):
        (source / name).write_text("{}")
        (source / name).chmod(mode)
    before = os.umask(0o077)
    try:
        model_folders.copy_tokenizer(source, copies)
    finally:
        os.umask(before)
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in copies.iterdir()} == dict.fromkeys(
        ("tokenizer.json", "chat_template.jinja", "generation_config.json"), "0o600"
    )


def test_quantized_teacher_is_not_cut(folders: Callable[[str], Path], tmp_path: Path) -> None:
    teacher = variant(folders("qwen3"), tmp_path / "teacher")
    config = json.loads((teacher / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (teacher / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match="its weights are quantized, so blocks can't be copied from it; give the model unq"
    ):
        making.copied_student(teacher, (0,), tmp_path / "student", dtype=torch.float32)
    assert not (tmp_path / "student").exists()


def test_random_student_is_a_function_of_its_seed_alone(folders: Callable[[str], Path], tmp_path: Path) -> None:
    width = {
        "hidden_size": 24,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "intermediate_size": 40,
        "head_dim": 4,
    }

    def make(name: str, seed: int) -> dict[str, torch.Tensor]:
        making.random_student(folders("qwen3"), 2, width, tmp_path / name, seed=seed, dtype=torch.float32)
        return load_file(tmp_path / name / "model.safetensors")

    torch.manual_seed(1)
    first = make("a", 7)
    before = torch.get_rng_state()
    again = make("b", 7)
    assert torch.equal(torch.get_rng_state(), before)  # and it leaves torch's own generator alone
    other = make("c", 8)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    student = load.load_causal_lm(tmp_path / "a", dtype=torch.float32, ds_config=None, attention="sdpa")
    assert len(parts.blocks(student)) == 2
    assert first["model.layers.0.self_attn.q_proj.weight"].shape == (12, 24)
    assert first["model.layers.1.mlp.up_proj.weight"].shape == (40, 24)
    assert student(torch.arange(5)[None]).logits.shape == (1, 5, 64)
    assert len(load.load_tokenizer(tmp_path / "a")) == len(load.load_tokenizer(folders("qwen3")))


@pytest.mark.parametrize(
    ("kind", "width", "expected"),
    [
        (
            "qwen2",
            {"head_dim": 8},
            r"student\.head_dim: the teacher's model type 'qwen2' has no such setting; leave it out",
        ),
        (
            "qwen3",
            {"num_attention_heads": 3},
            r"student\.num_key_value_heads: 3 attention heads can't share 2 .*divisor of 3",
        ),
    ],
)
def test_widths_that_cannot_be(
    folders: Callable[[str], Path], tmp_path: Path, kind: str, width: dict[str, int], expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        making.random_student(folders(kind), 2, width, tmp_path / "student", seed=0, dtype=torch.float32)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def _drop(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.2.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return "its weights lack 1 tensors of the model, first 'model.layers.2.mlp.up_proj.weight'; give the whole weights"


def _narrow(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    return "its weights have other shapes than its config.json says; give the weights with their own config.json"


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("spoil", [_drop, _narrow])
def test_weights_that_do_not_fill_the_model_are_refused(
    folders: Callable[[str], Path], tmp_path: Path, world: Any, sharded: bool, spoil: Callable[[Path], str]
) -> None:
    """transformers would make up what is missing and warn."""
    folder = variant(folders("qwen3"), tmp_path / "model")
    expected = spoil(folder)
    ds_config = teacher_ds_config(1, "float32", "none", block=1) if sharded else None
    with pytest.raises(InputError) as caught:
        load.load_causal_lm(folder, dtype=torch.float32, ds_config=ds_config, attention="sdpa")
    assert expected in str(caught.value)


def test_attention_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS["qwen3"]()
    assert load.attention_implementation("eager", torch.bfloat16, config) == ("eager", "as the recipe says")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load.attention_implementation("auto", torch.float32, config) == ("varlen", "packed rows need no mask")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    why = "no varlen: this GPU is older than compute capability 8.0"
    assert load.attention_implementation("auto", torch.bfloat16, config) == ("sdpa", why)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert load.attention_implementation("auto", torch.bfloat16, config)[0] == "flash_attention_2"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert load.attention_implementation("auto", torch.bfloat16, config)[0] == "varlen"
    why = "no varlen: FlashAttention does not compute in float32"
    assert load.attention_implementation("auto", torch.float32, config) == ("sdpa", why)
    assert load.attention_implementation("auto", torch.bfloat16, CONFIGS["gpt2"]())[0] == "flash_attention_2"
    assert load.attention_implementation("auto", torch.bfloat16, CONFIGS["stablelm"]())[0] == "sdpa"
    bloom = hf.BloomConfig()
    assert load.attention_implementation("auto", torch.bfloat16, bloom) == (
        "eager",
        "transformers has no sdpa for a 'bloom' model",
    )
    gpt_oss = hf.GptOssConfig()
    assert load.attention_implementation("auto", torch.bfloat16, gpt_oss)[0] == "flash_attention_2"
    assert load.attention_implementation("auto", torch.float32, gpt_oss)[0] == "eager"
    assert load.attention_implementation("sdpa", torch.float32, gpt_oss) == ("sdpa", "as the recipe says")


def test_attention_that_the_model_or_the_machine_lacks(folders: Callable[[str], Path], tmp_path: Path) -> None:
    hf.AutoModelForCausalLM.from_config(
        hf.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    ).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"can't be loaded with attention 'sdpa' \(BloomForCausalLM does not support"):
        load.load_causal_lm(tmp_path, dtype=torch.float32, ds_config=None, attention="sdpa")
    if not torch.cuda.is_available():
        with pytest.raises(
            InputError, match=r"student\.attention: flash_attention_2 needs a GPU and the package flash-attn; w"
        ):
            load.check_usable(CONFIGS["qwen3"](), section="student", attention="flash_attention_2", packed=False)
        with pytest.raises(
            InputError, match="can't be loaded with attention 'flash_attention_2'.*or another attention"
        ):
            load.load_causal_lm(folders("qwen3"), dtype=torch.float32, ds_config=None, attention="flash_attention_2")


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_sharded_bf16_model_keeps_its_rotary_frequencies(folders: Callable[[str], Path], world: Any, kind: str) -> None:
    plain, sharded = (
        load.load_causal_lm(folders(kind), dtype=torch.bfloat16, ds_config=ds_config, attention="sdpa")
        for ds_config in (None, teacher_ds_config(1, "bfloat16", "none", block=1))
    )
    theirs = dict(plain.named_buffers())
    names = [name for name, _ in sharded.named_buffers() if name.endswith("inv_freq")]
    assert names
    for name, buffer in sharded.named_buffers():
        if name in names:
            assert buffer.dtype == torch.float32 and torch.equal(buffer, theirs[name]), name
    weights = dict(plain.named_parameters())
    with gathered(list(sharded.parameters())):
        assert all(torch.equal(parameter, weights[name]) for name, parameter in sharded.named_parameters())


def test_a_model_folder_s_hash_sees_a_change_in_every_tensor(tmp_path: Path) -> None:
    """Of a file of 3 MiB: a tensor in the middle whose numbers all differ; as they were again, the hash is the first one."""
    tensors = {f"tensor.{number}": torch.randn(256, 1024) for number in range(3)}
    file = tmp_path / "model.safetensors"

    def contents(changed: dict[str, torch.Tensor]) -> str:
        save_file({**tensors, **changed}, file)
        assert file.stat().st_size > 3 * 2**20
        return model_folders.folder_contents(tmp_path, weights_alone=True)

    before = contents({})
    seen = {name: contents({name: tensor + 1}) for name, tensor in tensors.items()}
    assert len({before, *seen.values()}) == 4
    assert contents({}) == before


def test_a_model_folder_s_hash_sees_all_of_a_small_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("a" * 2**20 + "b" + "a" * (2**20 - 1))
    before = model_folders.folder_contents(tmp_path)
    (tmp_path / "tokenizer.json").write_text("a" * 2**20 + "c" + "a" * (2**20 - 1))
    assert model_folders.folder_contents(tmp_path) != before


def test_a_large_file_that_is_no_safetensors_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"<" * 3 * 2**20)
    with pytest.raises(InputError, match="model.safetensors is not whole; download or copy the model again"):
        model_folders.folder_contents(tmp_path)
