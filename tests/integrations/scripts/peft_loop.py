"""Trains PEFT's adapters in a loop of its own."""

import json

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained("base")
model = AutoModelForSequenceClassification.from_pretrained("base")
model = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=4, lora_alpha=16))
with open("train.jsonl") as lines:
    rows = [json.loads(line) for line in lines]
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
model.train()
for _ in range(8):
    for start in range(0, len(rows), 8):
        part = rows[start : start + 8]
        batch = tokenizer([row["text"] for row in part], padding=True, return_tensors="pt")
        loss = model(**batch, labels=torch.tensor([row["label"] for row in part])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
model.save_pretrained("result")
