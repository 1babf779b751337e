"""Lightning's trainer around a causal language model."""

from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from .setting import Check, Setting, expect, expect_close, tokenized
from .texts import sentences


TOOLS = ("lightning", "transformers")
ROUNDING = 1e-5


class LanguageModel(lightning.LightningModule):
    """What a person writes: the loss in training and validation, logits in prediction."""

    def __init__(self, path: str):
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(path)

    def training_step(self, batch):
        loss = self.model(**batch, labels=batch["input_ids"]).loss
        self.log("loss", loss)
        return loss

    def validation_step(self, batch):
        self.log("held out", self.model(**batch, labels=batch["input_ids"]).loss)

    def predict_step(self, batch):
        return self.model(**batch).logits

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(setting: Setting, **options: Any) -> dict[str, Any]:
    """Fit, validate, predict and fit on from the checkpoint."""
    module = LanguageModel(setting.causal)
    batches = [tokenized(setting.causal, sentences()[place : place + 2]) for place in range(0, 8, 2)]
    loader = DataLoader(
        [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in batches], batch_size=None
    )
    shared = {
        "accelerator": "cpu",
        "default_root_dir": setting.folder,
        "enable_progress_bar": False,
        "logger": False,
        "num_sanity_val_steps": 1,
    }
    trainer = lightning.Trainer(max_epochs=1, **shared, **options)
    trainer.fit(module, loader, loader)
    held_out = trainer.validate(module, loader)[0]["held out"]
    predicted = trainer.predict(module, loader)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled="precision" in options):
        own = [module.model(**batch).logits for batch in loader]
    for theirs, ours in zip(predicted, own, strict=True):
        expect_close("predicted logits", theirs, ours, ROUNDING)
    path = setting.folder / "on.ckpt"
    trainer.save_checkpoint(path)
    again = lightning.Trainer(max_epochs=2, **shared, **options)
    again.fit(LanguageModel(setting.causal), loader, loader, ckpt_path=path)
    expect("training went on where it stopped", again.global_step == 2 * trainer.global_step)
    return {"held out": held_out}


def fit_in_bfloat16(setting: Setting) -> dict[str, Any]:
    """The same under autocast."""
    return fit(setting, precision="bf16-mixed")


CHECKS: dict[str, Check] = {"fit, validate, predict, resume": fit, "the same in bf16-mixed": fit_in_bfloat16}
