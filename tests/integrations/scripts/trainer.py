"""Fine-tunes a classifier of sentences with transformers' Trainer."""

import json

from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

(arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
tokenizer = AutoTokenizer.from_pretrained("base")
model = AutoModelForSequenceClassification.from_pretrained("base")
with open("train.jsonl") as lines:
    rows = Dataset.from_list([json.loads(line) for line in lines])
rows = rows.map(lambda batch: tokenizer(batch["text"]), batched=True)
trainer = Trainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
trainer.save_model("result")
