"""Fine-tunes a classifier in a loop that accelerate brings onto any number of devices."""

import json

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

accelerator = Accelerator(gradient_accumulation_steps=2)
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained("base")
model = AutoModelForSequenceClassification.from_pretrained("base")
with open("train.jsonl") as lines:
    rows = [json.loads(line) for line in lines]


def collate(part):
    batch = tokenizer([row["text"] for row in part], padding=True, return_tensors="pt")
    return {**batch, "labels": torch.tensor([row["label"] for row in part])}


loader = DataLoader(rows, batch_size=4, shuffle=True, collate_fn=collate)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
schedule = get_linear_schedule_with_warmup(optimizer, 2, 4 * len(loader))
model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
model.train()
for _ in range(4):
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
accelerator.wait_for_everyone()
if accelerator.is_main_process:
    accelerator.unwrap_model(model).save_pretrained("result")
