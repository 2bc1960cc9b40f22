"""The DeepSpeed files: parsed by DeepSpeed itself, no key ignored, nothing that matters left to a default."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch  # noqa: E402
from deepspeed.runtime.config import DeepSpeedConfig  # noqa: E402

from llmkd.distributed.ds_checks import NOT_HERE  # noqa: E402
from llmkd.distributed.ds_configs import complete_ds_config, load_ds_config, zero_stage  # noqa: E402
from llmkd.errors import InputError  # noqa: E402

FOLDER = Path(__file__).parents[3] / "ds_configs"
FILES = sorted(FOLDER.glob("*.json"))

# Every leaf that the recipe decides, with a value that no default of DeepSpeed's equals.
RECIPE_VALUES: dict[str, Any] = {
    "train_batch_size": 21,
    "train_micro_batch_size_per_gpu": 3,
    "gradient_accumulation_steps": 7,
    "gradient_clipping": 0.25,
    "bf16.enabled": True,
    "zero_optimization.offload_param.nvme_path": "/nowhere/nvme",
    "zero_optimization.offload_optimizer.nvme_path": "/nowhere/nvme",
}


class Recording(dict[str, Any]):
    """A dict that remembers which of its keys were asked for, by itself and by its copies."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)


def leaves(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"bf16": {"enabled": x}}` -> `{"bf16.enabled": x}`."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def filled(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The configuration with every "recipe" replaced."""
    return {
        key: filled(value, f"{prefix}{key}.")
        if isinstance(value, dict)
        else RECIPE_VALUES[f"{prefix}{key}"]
        if value == "recipe"
        else value
        for key, value in config.items()
    }


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return json.loads(request.param.read_text())


def test_the_five_files_are_here() -> None:
    assert [file.stem for file in FILES] == ["cpu", "zero2", "zero3", "zero3_offload_cpu", "zero3_offload_nvme"]


def test_deepspeed_takes_what_the_recipe_gives(config: dict[str, Any]) -> None:
    parsed = DeepSpeedConfig(filled(config))
    assert parsed.train_batch_size == 21
    assert parsed.train_micro_batch_size_per_gpu == 3
    assert parsed.gradient_accumulation_steps == 7
    assert parsed.gradient_clipping == 0.25
    assert parsed.bfloat16_config.enabled is True
    for section in (parsed.zero_config.offload_param, parsed.zero_config.offload_optimizer):
        assert section is None or section.device != "nvme" or str(section.nvme_path) == "/nowhere/nvme"


def test_the_recipe_decides_the_same_keys_in_every_file(config: dict[str, Any]) -> None:
    decided = {key for key, value in leaves(config).items() if value == "recipe"}
    always = {key for key in RECIPE_VALUES if not key.endswith("nvme_path")}
    devices = {"offload_param", "offload_optimizer"}
    nvme = {
        f"zero_optimization.{part}.nvme_path"
        for part in devices
        if config["zero_optimization"].get(part, {}).get("device") == "nvme"
    }
    assert decided == always | nvme


def test_no_key_is_unknown_to_deepspeed(config: dict[str, Any]) -> None:
    # DeepSpeed's models forbid unknown keys in zero_optimization, bf16 and fp16; elsewhere it never looks at them.
    recording = Recording({k: Recording(v) if isinstance(v, dict) else v for k, v in filled(config).items()})
    DeepSpeedConfig(recording)
    assert set(recording) - recording.asked == set()
    for name in ("data_types", "checkpoint", "torch_autocast", "aio"):
        section = recording.get(name, Recording({}))
        assert set(section) - section.asked == set(), name


@pytest.mark.parametrize("section", [None, "data_types", "zero_optimization", "bf16"])
def test_a_misspelt_key_is_noticed(config: dict[str, Any], section: str | None) -> None:
    # The check above can fail: a key that DeepSpeed does not know stays unasked, or is refused.
    (config if section is None else config[section])["gradient_cliping"] = 1.0
    with pytest.raises((AssertionError, ValueError), match="gradient_cliping"):
        test_no_key_is_unknown_to_deepspeed(config)


def test_nothing_that_changes_numbers_is_left_to_a_default(config: dict[str, Any]) -> None:
    stated = set(leaves(config))
    assert stated >= {
        "gradient_clipping",
        "gradient_allreduce_op",
        "prescale_gradients",
        "gradient_predivide_factor",
        "communication_data_type",
        "data_types.grad_accum_dtype",
        "bf16.enabled",
        "bf16.check_grad_overflow",
        "fp16.enabled",
        "zero_optimization.stage",
        "zero_optimization.overlap_comm",
        "zero_optimization.contiguous_gradients",
        "zero_optimization.reduce_bucket_size",
        "zero_optimization.offload_optimizer.device",
    }
    assert config["timers"]["throughput"] == {"enabled": False}  # they would wait for the device at every micro-batch
    if config["zero_optimization"]["stage"] == 3:
        assert stated >= {
            "zero_optimization.stage3_param_persistence_threshold",
            "zero_optimization.stage3_prefetch_bucket_size",
            "zero_optimization.stage3_max_live_parameters",
            "zero_optimization.stage3_max_reuse_distance",
            "zero_optimization.stage3_gather_16bit_weights_on_model_save",
            "zero_optimization.sub_group_size",
            "zero_optimization.zero_quantized_weights",
            "zero_optimization.offload_param.device",
        }


def test_sums_are_fp32_and_the_mean_is_what_the_loop_undoes(config: dict[str, Any]) -> None:
    parsed = DeepSpeedConfig(filled(config))
    assert parsed.communication_data_type == torch.float32
    assert parsed.grad_accum_dtype == "fp32"
    assert (parsed.gradient_allreduce_op, parsed.prescale_gradients, parsed.gradient_predivide_factor) == (
        "mean",
        False,
        1.0,
    )
    assert not parsed.bfloat16_config.bf16_master_weights_and_grads


def test_the_files_differ_only_in_zero_and_aio() -> None:
    parts = {
        file.stem: {k: v for k, v in json.loads(file.read_text()).items() if k not in ("zero_optimization", "aio")}
        for file in FILES
    }
    assert all(part == parts["zero3"] for part in parts.values())


def test_cpu_keeps_no_matrix_whole() -> None:
    # A threshold above a small model's matrices would quietly turn ZeRO-3 off where the tests and the quickstart look at it.
    cpu = json.loads((FOLDER / "cpu.json").read_text())["zero_optimization"]
    assert cpu["stage"] == 3
    assert cpu["stage3_param_persistence_threshold"] < 64 * 32


def test_the_table_names_every_key(config: dict[str, Any]) -> None:
    table = (FOLDER / "README.md").read_text()
    keys = (set(config) | set(config["zero_optimization"])) - {"zero_optimization", "stage"}
    assert {key for key in keys if key not in table} == set()


# The shape of nearly every public DeepSpeed file.
AUTO: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "fp16": {"enabled": "auto"},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    },
}
NUMBERS: dict[str, Any] = dict(world_size=2, micro_batch=3, accumulation=7, clip=0.25, nvme_path="/nowhere/nvme")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_auto_is_the_recipes_value_or_deepspeeds_default(dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        completed = complete_ds_config(AUTO, **NUMBERS, dtype=dtype)
    decided = {"train_batch_size": 42, "train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 7}
    assert completed == {
        **decided,
        "gradient_clipping": 0.25,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {"stage": 3},
    }
    assert "fp16.enabled, zero_optimization.reduce_bucket_size, zero_optimization.stage3_prefetch" in caplog.text
    assert "bf16.enabled" not in caplog.text
    default = DeepSpeedConfig({"train_batch_size": 1, "zero_optimization": {"stage": 3}}).zero_config
    assert DeepSpeedConfig({**completed, "train_batch_size": 21}).zero_config == default


def test_auto_and_recipe_mean_the_same(config: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    auto = json.loads(json.dumps(config).replace('"recipe"', '"auto"'))
    assert auto != config
    with caplog.at_level("INFO"):
        completed = complete_ds_config(auto, **NUMBERS, dtype="bfloat16")
    assert completed == complete_ds_config(config, **NUMBERS, dtype="bfloat16") and not caplog.text
    assert "auto" not in leaves(completed).values() and "recipe" not in leaves(completed).values()


def test_an_nvme_path_may_be_auto_or_the_users_own() -> None:
    nvme: dict[str, Any] = {"device": "nvme", "nvme_path": "auto"}
    zero = {"stage": 3, "offload_param": nvme, "offload_optimizer": {"device": "nvme", "nvme_path": "/mine"}}
    completed = complete_ds_config({"zero_optimization": zero}, **NUMBERS, dtype="float32")["zero_optimization"]
    assert completed["offload_param"]["nvme_path"] == "/nowhere/nvme"
    assert completed["offload_optimizer"]["nvme_path"] == "/mine"


def test_a_stage_of_auto_is_deepspeeds_default() -> None:
    assert zero_stage({"zero_optimization": {"stage": "auto"}}) == zero_stage({}) == 0


def test_all_that_is_wrong_with_a_file_is_one_sentence() -> None:
    wrong = {
        **AUTO,
        "gradient_clipping": 1.0,
        "fp16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    }
    with pytest.raises(InputError) as caught:
        complete_ds_config(wrong, **NUMBERS, dtype="float32")
    assert str(caught.value) == (
        'DeepSpeed configuration: gradient_clipping is 1.0, the recipe gives 0.25; write "auto" there, or leave it out; '
        "fp16 can't be used here (train.dtype is float32 or bfloat16); remove it; "
        "optimizer can't be used here (train.* sets it); remove it"
    )


# Each is a section of files that people have, with a switch where DeepSpeed's has one.
REFUSED: dict[str, Any] = {
    "tensor_parallel": {"autotp_size": 2},
    "compile": {"deepcompile": True},
    "scheduler": {"type": "WarmupLR", "params": {}},
    "amp": {"enabled": True, "opt_level": "O1"},
    "autotuning": {"enabled": True},
    "hybrid_engine": {"enabled": True},
    "sparse_attention": {"mode": "fixed"},
    "curriculum_learning": {"enabled": True},
    "gradient_allreduce_op": "sum",
    "zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}},
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_can_not_work_here_is_refused_with_its_reason(key: str) -> None:
    name = "zero_optimization.zenflow" if key == "zero_optimization" else key
    with pytest.raises(
        InputError, match=rf"DeepSpeed configuration: {name} (can't be used here \(.+\); remove it|must be mean)"
    ):
        complete_ds_config({**AUTO, key: REFUSED[key]}, **NUMBERS, dtype="float32")


@pytest.mark.parametrize("key", sorted(NOT_HERE.keys() - {"optimizer", "scheduler"}))
def test_a_section_that_is_switched_off_is_left_out(key: str) -> None:
    completed = complete_ds_config({**AUTO, key: {"enabled": False, "other": 1}}, **NUMBERS, dtype="float32")
    DeepSpeedConfig({**completed, "train_batch_size": 21})  # it refuses some of them even so, which must not be there
    assert key not in completed


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"zero_optimization": 3}, "zero_optimization must be a section, it is 3"),
        ({"bf16": True}, "bf16 must be a section, it is True"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4; write 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "3"}}, "zero_optimization.stage is '3'; write"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": "cpu"}},
            "zero_optimization.offload_param must be a section, it is 'cpu'",
        ),
    ],
)
def test_a_section_that_is_none_is_one_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        complete_ds_config({**AUTO, **change}, **NUMBERS, dtype="float32")


# Each of these trained or tracebacked before it was refused.
ZERO_FAULTS = [
    ({"foo": 1}, "zero_optimization.foo: DeepSpeed has no such key; remove it"),
    ({"reduce_bucket_size": "5e8"}, "zero_optimization.reduce_bucket_size is '5e8'; it must be a valid integer"),
    ({"reduce_bucket_size": -1}, "zero_optimization.reduce_bucket_size is -1; it must be greater than 0"),
    (
        {"offload_optimizer": {"device": "gpu"}},
        "zero_optimization.offload_optimizer.device is 'gpu'; it must be 'none', 'cpu' or 'nvme'",
    ),
    (
        {"elastic_checkpoint": True},
        "zero_optimization.elastic_checkpoint can't be used here (a run that is saved with it can't be resumed, and one without it "
        "resumes on any number of ranks); remove it",
    ),
]
FAULTS = [
    ({"sparse_gradients": True}, "sparse_gradients can't be used here (DeepSpeed no longer has it); remove it"),
    (
        {"prescale_gradients": True, "gradient_predivide_factor": 2.0},
        "prescale_gradients can't be used with ZeRO stage 2 or 3 and reduce_scatter; remove it, or write "
        "zero_optimization.reduce_scatter: false; gradient_predivide_factor can't be used with ZeRO stage 2 or 3 and reduce_scatter; "
        "remove it, or write zero_optimization.reduce_scatter: false",
    ),
    ({"gradient_predivide_factor": 0}, "gradient_predivide_factor is 0; write a number above 0"),
    (
        {"checkpoint": {"writer": {"type": "fast"}}},
        "checkpoint.writer can't be used here (checkpoints are written by torch.save); remove it",
    ),
    (
        {"checkpoint": {"load_universal": True}},
        "checkpoint.load_universal can't be used here (llmkd sets it where a run resumes on another number of ranks; with it every other "
        "resume fails); remove it",
    ),
    ({"sequence_parallel_size": 2}, "sequence_parallel_size must be 1: no text is split over ranks"),
    ({"steps_per_print": "x"}, "steps_per_print is 'x'; write a whole number from 1"),
    ({"steps_per_print": 0}, "steps_per_print is 0; write a whole number from 1"),
    ({"wall_clock_breakdown": "false"}, "wall_clock_breakdown is 'false'; write true or false"),
    ({"aio": {"block_size": "x"}}, "aio.block_size is 'x'; write a whole number from 1"),
    ({"data_types": {"grad_accum_dtype": "fp64"}}, "data_types.grad_accum_dtype is 'fp64'; write fp32, bf16 or fp16"),
    (
        {"communication_data_type": "foo"},
        "communication_data_type: DeepSpeed refuses it (Invalid communication_data_type. Supported data types: ['fp16', 'bf16', 'fp32']. "
        "Got: foo); correct it, or remove it",
    ),
    (
        {"checkpoint": {"tag_validation": "Foo"}},
        "checkpoint: DeepSpeed refuses it (Checkpoint config contains invalid tag_validation value of FOO, expecting one of "
        "['WARN', 'IGNORE', 'FAIL']); correct it, or remove it",
    ),
    ({"tensorboard": {"enable": True}}, "tensorboard.enable: DeepSpeed has no such key; remove it"),
    (
        {"comms_logger": 3},
        "comms_logger: DeepSpeed refuses it (deepspeed.comm.config.CommsLoggerConfig() argument after ** must be a mapping, not int); "
        "correct it, or remove it",
    ),
    *(({"zero_optimization": {"stage": 2, **zero}}, sentence) for zero, sentence in ZERO_FAULTS),
]


@pytest.mark.parametrize(("change", "sentence"), FAULTS, ids=[json.dumps(change) for change, _ in FAULTS])
def test_what_deepspeed_would_refuse_later_is_one_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        complete_ds_config({**AUTO, **change}, **NUMBERS, dtype="float32", name="train.deepspeed (mine.json)")
    assert str(caught.value) == f"train.deepspeed (mine.json): {sentence}"


def test_all_that_deepspeed_refuses_is_one_sentence() -> None:
    wrong = {**AUTO, "zero_optimization": {"stage": 2, "foo": 1, "bar": 1}, "bf16": {"baz": 1}}
    with pytest.raises(InputError) as caught:
        complete_ds_config(wrong, **NUMBERS, dtype="float32")
    assert all(
        f"{key}: DeepSpeed has no such key" in str(caught.value) for key in ("bf16.baz", "zero_optimization.bar")
    )


def test_scaled_gradients_are_fine_where_zero_does_not_scatter() -> None:
    config = {**AUTO, "zero_optimization": {"stage": 2, "reduce_scatter": False}, "prescale_gradients": True}
    assert complete_ds_config(config, **NUMBERS, dtype="float32")["prescale_gradients"]


@pytest.mark.parametrize(
    ("section", "package"), [("wandb", "wandb"), ("tensorboard", "tensorboard"), ("comet", "comet_ml")]
)
def test_a_monitor_needs_its_package(section: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    sentence = f"{section}.enabled: the package {package} is not installed; run pip install {package}, or remove"
    with pytest.raises(InputError, match=sentence):
        complete_ds_config({**AUTO, section: {"enabled": True}}, **NUMBERS, dtype="float32")
    complete_ds_config({**AUTO, section: {"enabled": False}}, **NUMBERS, dtype="float32")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"a": "é"}'.encode("latin-1"), "not UTF-8 at byte 7; save it in that encoding"),
        (b"[" * 100_000, "JSON that can't be read \\(.*\\); correct it"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "sections within sections, more than 20 deep"),
        (b'{"a": ' + b"1" * 5000 + b"}", "JSON that can't be read \\(.*\\); correct it"),
        (b'{"a": }', "not valid JSON at line 1: Expecting value"),
        (b"[]", "a DeepSpeed configuration is a JSON object"),
    ],
    ids=["latin-1", "brackets", "nested", "digits", "syntax", "list"],
)
def test_a_file_that_can_not_be_read_is_one_sentence(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "mine.json").write_bytes(content)
    with pytest.raises(InputError, match=f"^{tmp_path}/mine.json: {sentence}"):
        load_ds_config(str(tmp_path / "mine.json"), FOLDER)


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"bf16": {}}', encoding="utf-8-sig")
    assert load_ds_config(str(tmp_path / "mine.json"), FOLDER) == {"bf16": {}}
