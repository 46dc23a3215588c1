"""Fine-tune a LoRA adapter and seven taxonomy heads: the command and the function.

Input: labelled sequences. Output: a model folder.
`accelerate launch --quiet launch/finetune.py --config configs/finetune_demo.yaml` runs it.
"""

import os
from collections.abc import Sequence
from typing import Any

from .cli import check_keys, run_command
from .options import SAMPLE, FinetuneConfig
from .reads.lineages import RANKS


def finetune(config: FinetuneConfig) -> dict[str, Any]:
    """Run a config; see `train.finetune`."""
    from .errors import InputError
    from .reads.inputs import expand_inputs

    if not config.train:
        raise InputError("no training sequences given; pass --train FILES")
    expand_inputs(config.train)  # reports missing files before the heavy imports
    choose_backend(config.device)
    from .training.run import finetune as run

    return run(config)


def choose_backend(device: str) -> None:
    """Tell accelerate, before it is imported, whether to use torch_xla.

    Otherwise it uses torch_xla whenever it is installed.
    """
    from .encode.choice import choose

    os.environ["USE_TORCH_XLA"] = "1" if choose(device)[0] == "xla" else "0"


def run_finetuning_pipeline(
    training_data_path: str | Sequence[str],
    model_output_path: str,
    eval_data_path: str | Sequence[str] | None = None,
    num_epochs: int = 10,
    batch_size: int = 32,
    learning_rate: float = 2e-4,
    use_wandb: bool = True,
    wandb_project: str = "global-bioscan-lora",
    **options: Any,
) -> dict[str, Any]:
    """Fine-tune on labelled sequences; resumes if `model_output_path` holds a checkpoint.

    Args:
        training_data_path: files, globs, folders, URLs.
        model_output_path: folder for the model.
        eval_data_path: labelled sequences to evaluate on; None holds out part of the training data.
        num_epochs: passes over the training sequences.
        batch_size: sequences per step.
        learning_rate: peak learning rate.
        use_wandb: report to Weights & Biases; a failure there never stops training.
        wandb_project: the project there.
        **options: any other field of `bioscan_xla.options.FinetuneConfig`.

    Returns:
        `start_time`, `end_time` (ISO 8601), `total_loss` (mean over the epochs), `num_epochs`,
        `epoch_1_loss` ..., `model_path`, `evaluation` (see `metrics.evaluate`), `skipped_updates`,
        `compiles`, `interrupted`, `process_index`.

    Raises:
        BioscanError: a subclass; the message says what happened, where, and what to do.
    """
    check_keys(FinetuneConfig, list(options), "run_finetuning_pipeline")
    return finetune(
        FinetuneConfig(
            train=training_data_path,  # type: ignore[arg-type]
            output=model_output_path,
            eval=eval_data_path or (),  # type: ignore[arg-type]
            num_epochs=num_epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            tracker="wandb" if use_wandb else "none",
            wandb_project=wandb_project,
            **options,
        )
    )


def summary(result: dict[str, Any]) -> str:
    """The summary printed at the end."""
    if result["interrupted"]:
        return "interrupted; a checkpoint is saved. Run the same command to resume"
    count = result["num_epochs"]
    epochs = "1 epoch" if count == 1 else f"{count} epochs"
    lines = [f"{epochs}, last loss {_last_loss(result):.4f}"]
    figures = result["evaluation"]
    if figures:
        lines.append("rank      accuracy  macro-F1  top-3")
        lines += [
            f"{rank:9} {figures[f'{rank}/accuracy']:8.3f}  {figures[f'{rank}/macro_f1']:8.3f}  "
            f"{figures[f'{rank}/top3']:5.3f}"
            for rank in RANKS
            if f"{rank}/accuracy" in figures
        ]
    lines.append(
        f"model in {result['model_path']}; next: python -m bioscan_xla.embed "
        f"--adapter {result['model_path']} --input FILES --db FOLDER"
    )
    return "\n".join(lines)


def _last_loss(result: dict[str, Any]) -> float:
    return result[f"epoch_{result['num_epochs']}_loss"]


def _work(config: FinetuneConfig) -> int:
    from .sample import provide_demo

    provide_demo(config.train, config.model)
    result = finetune(config)
    if result["process_index"] == 0:
        print(summary(result))
    return 128 + result["interrupted"] if result["interrupted"] else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return run_command(
        FinetuneConfig,
        _work,
        arguments,
        "launch/finetune.py",
        on_second_signal="stopped at once; run the same command to resume from the last checkpoint",
        demo={
            "train": SAMPLE,
            "output": "demo/classifier",
            "model": "bioscan-small",
            "device": "cpu",
            "dtype": "float32",
            "num_epochs": 12,
            "batch_size": 16,
            "learning_rate": 0.003,
            "warmup_steps": 20,
            "eval_fraction": 0.2,
        },
        demo_note="No options given: fine-tuning the shipped encoder bioscan-small on the built-in "
        "sample (demo/sample.parquet) into demo/classifier. Your own data: "
        "accelerate launch --quiet launch/finetune.py --train FILES --output FOLDER",
    )
