"""Tiny random models of the real classes, by family, and what they compute from whole tensors, to compare with."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf
import yaml
from torch import Tensor

from llmkd.data.batches import IGNORE, Batch
from llmkd.layer_map import DECODER_EMBEDDING, EMBEDDING
from llmkd.losses.distances import DISTANCES
from llmkd.models import make
from llmkd.models.families import depths
from llmkd.models.parts import output_state
from llmkd.recipe.recipe import Recipe, load_recipe
from tests import definitions
from tests.tiny import WORDS, recipe_values

VOCABULARY = 320
SIZES: dict[str, Any] = dict(vocab_size=VOCABULARY, hidden_size=32, max_position_embeddings=64, bos_token_id=None)
ENDS: dict[str, Any] = dict(eos_token_id=1, pad_token_id=0)
GATED: dict[str, Any] = dict(**SIZES, **ENDS, intermediate_size=48, num_attention_heads=4, initializer_range=0.3)
OPT: dict[str, Any] = dict(vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_attention_heads=4, init_std=0.3)
OPT |= dict(max_position_embeddings=64, dropout=0.0, bos_token_id=1, **ENDS)

DECODERS: dict[str, Callable[[int], Any]] = {
    "opt": lambda n: hf.OPTConfig(**OPT, num_hidden_layers=n, word_embed_proj_dim=32),
    # as OPT-350m: norms after the sublayers, no final norm, embeddings narrower than the states
    "opt_narrow": lambda n: hf.OPTConfig(
        **OPT, num_hidden_layers=n, word_embed_proj_dim=16, do_layer_norm_before=False
    ),
    "llama": lambda n: hf.LlamaConfig(**GATED, num_hidden_layers=n, num_key_value_heads=2),
    "mistral": lambda n: hf.MistralConfig(**GATED, num_hidden_layers=n, num_key_value_heads=2, sliding_window=5),
    "qwen2": lambda n: hf.Qwen2Config(**GATED, num_hidden_layers=n, num_key_value_heads=2, tie_word_embeddings=True),
    "gemma": lambda n: hf.GemmaConfig(**GATED, num_hidden_layers=n, num_key_value_heads=2, head_dim=8),
    "gemma3_text": lambda n: hf.Gemma3TextConfig(**GATED, num_hidden_layers=n, num_key_value_heads=2, head_dim=8),
}
BERT: dict[str, Any] = dict(
    **{k: v for k, v in GATED.items() if k != "eos_token_id"}, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
)
CLASSES_OF_TEXTS: dict[str, Any] = dict(num_labels=3)
ENCODERS: dict[str, Callable[[int], Any]] = {
    "bert": lambda n: hf.BertConfig(**BERT, num_hidden_layers=n, **CLASSES_OF_TEXTS),
    "roberta": lambda n: hf.RobertaConfig(**BERT, num_hidden_layers=n, **CLASSES_OF_TEXTS),
    "xlm-roberta": lambda n: hf.XLMRobertaConfig(**BERT, num_hidden_layers=n, **CLASSES_OF_TEXTS),
    "camembert": lambda n: hf.CamembertConfig(**BERT, num_hidden_layers=n, **CLASSES_OF_TEXTS),
    "distilbert": lambda n: hf.DistilBertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=64, dim=32, hidden_dim=48, n_layers=n, n_heads=4, **CLASSES_OF_TEXTS,
        initializer_range=0.3, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, pad_token_id=0,
    ),
}  # fmt: skip
T5: dict[str, Any] = dict(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_heads=4, dropout_rate=0.0)
T5 |= dict(decoder_start_token_id=0, **ENDS, initializer_factor=2.0)
UNTIED: dict[str, Any] = dict(tie_word_embeddings=False)
ENCODER_DECODERS: dict[str, Callable[[int, int], Any]] = {
    "t5": lambda e, d: hf.T5Config(**T5, num_layers=e, num_decoder_layers=d),
    # as T5 1.1 and Flan: gated, the state is not scaled before the head
    "t5_unscaled": lambda e, d: hf.T5Config(
        **T5, num_layers=e, num_decoder_layers=d, feed_forward_proj="gated-gelu", **UNTIED
    ),
    "mt5": lambda e, d: hf.MT5Config(
        **T5, num_layers=e, num_decoder_layers=d, feed_forward_proj="gated-gelu", **UNTIED
    ),
    "bart": lambda e, d: hf.BartConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=e, decoder_layers=d, encoder_ffn_dim=48, decoder_ffn_dim=40,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64, init_std=0.3, dropout=0.0,
        decoder_start_token_id=1, bos_token_id=2, forced_eos_token_id=None, scale_embedding=True, **ENDS,
    ),
}  # fmt: skip
CLASSES = {
    "decoder": hf.AutoModelForCausalLM,
    "encoder": hf.AutoModelForSequenceClassification,
    "encoder_decoder": hf.AutoModelForSeq2SeqLM,
}


def new(config: Any, kind: str, seed: int = 0) -> Any:
    """A model of that shape whose norms and biases, BART's logits' too, are not at their starting values."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLASSES[kind].from_config(config).eval()
        for tensor in [*model.parameters(), *(b for n, b in model.named_buffers() if n == "final_logits_bias")]:
            tensor.data += 0.05 * torch.randn_like(tensor)
    return model


def plain_losses(
    teacher: Any,
    student: Any,
    pairs: Sequence[tuple[int, int]],
    batch: Batch,
    *,
    distance: str = "normalized_mse",
    normed: bool = False,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(CE, KL, each pair's distance) as means over positions, by the models' own forward and `output_hidden_states`."""
    with torch.no_grad():
        theirs, their_states = run(teacher, batch, normed)
    ours, our_states = run(student, batch, normed)
    kept = batch.targets != IGNORE
    ce = F.cross_entropy(ours[kept], batch.targets[kept])
    kl = definitions.divergence("forward_kl", ours[kept], theirs[kept], temperature).mean()
    distances = []
    for block, target in pairs:
        where = batch.attended
        if batch.source_attended is not None and EMBEDDING <= block < depths(student.config)[0]:
            where = batch.source_attended
        distances.append(DISTANCES[distance](our_states[block], their_states[target])[where].mean())
    return ce, kl, distances


def run(model: Any, batch: Batch, normed: bool = False) -> tuple[Tensor, dict[int, Tensor]]:
    """(logits, states by block number) of a whole model, which is given padded ids and masks as its users give them."""
    raw: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if name.endswith("final_layer_norm") and "layers" not in name:  # transformers shows the last state after it
            hooks.append(module.register_forward_pre_hook(lambda m, args, name=name: raw.update({name: args[0]})))
    if batch.source_ids is not None:
        assert batch.source_attended is not None
        out = model(
            input_ids=batch.source_ids,
            attention_mask=batch.source_attended.long(),
            decoder_input_ids=batch.input_ids,
            decoder_attention_mask=batch.attended.long(),
            output_hidden_states=True,
        )
        encoder = len(out.encoder_hidden_states) - 1
        states = {EMBEDDING: out.encoder_hidden_states[0], DECODER_EMBEDDING: out.decoder_hidden_states[0]}
        states |= dict(enumerate(out.encoder_hidden_states[1:]))
        states |= {encoder + n: state for n, state in enumerate(out.decoder_hidden_states[1:])}
        ends = {"encoder.final_layer_norm": encoder - 1, "decoder.final_layer_norm": max(states)}
        if not normed:
            states |= {ends[name]: state for name, state in raw.items()}
        logits = out.logits
    else:
        segments = {} if batch.segments is None else {"token_type_ids": batch.segments}
        stack = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
        hooks.append(stack[-1].register_forward_hook(lambda m, args, out: raw.update(last=output_state(out))))
        mask = batch.attended.long()
        out = model(input_ids=batch.input_ids, attention_mask=mask, output_hidden_states=True, **segments)
        states = {EMBEDDING: out.hidden_states[0], **dict(enumerate(out.hidden_states[1:]))}
        if not normed:
            states[len(states) - 2] = raw["last"]
        logits = out.logits if out.logits.ndim == 3 else out.logits[:, None]
    for hook in hooks:
        hook.remove()
    return logits, states


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def write_rows(folder: Path, kind: str) -> None:
    """rows.jsonl: a text's class is where its words come from; or a text and the same words backwards."""
    draw = random.Random(0)
    rows: list[dict[str, Any]] = []
    for number in range(40):
        words = draw.choices(WORDS[5 * (number % 3) : 5 * (number % 3) + 5], k=draw.randint(1, 9))
        if kind == "encoder":
            rows.append({"text": " ".join(words), "label": ("first", "second", "third")[number % 3]})
        else:
            rows.append({"prompt": " ".join(words), "completion": " ".join(reversed(words))})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def family_recipe(folder: Path, kind: str, teacher: Any, **changes: Any) -> Recipe:
    """Rows, a teacher with a tokenizer of its family, and a recipe of two steps for them."""
    write_rows(folder, kind)
    tokenizer = make.new_tokenizer(WORDS, VOCABULARY, kind)  # type: ignore[arg-type]
    if kind == "encoder":
        names = ("first", "second", "third")
        teacher.config.id2label, teacher.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    teacher.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    values = recipe_values(folder)
    values["student"] = {"blocks": 2}
    values["data"]["max_length"] = 56
    values["matching"] = {"embedding": True}
    values["train"] |= {"steps": 2, "warmup_steps": 0, "final_learning_rate": 0.0}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return load_recipe(folder / "recipe.yaml").changed(changes)
