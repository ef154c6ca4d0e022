"""Fine-tunes a classifier as a LightningModule."""

import json

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

lightning.seed_everything(0, verbose=False)
tokenizer = AutoTokenizer.from_pretrained("base")


def collate(part):
    batch = tokenizer([row["text"] for row in part], padding=True, return_tensors="pt")
    return {**batch, "labels": torch.tensor([row["label"] for row in part])}


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = AutoModelForSequenceClassification.from_pretrained("base")
        self.model.train()

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=5e-3)


with open("train.jsonl") as lines:
    loader = DataLoader([json.loads(line) for line in lines], batch_size=8, collate_fn=collate)
module = Classifier()
trainer = lightning.Trainer(
    max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
)
trainer.fit(module, loader)
module.model.save_pretrained("result")
