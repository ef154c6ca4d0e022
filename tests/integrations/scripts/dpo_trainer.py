"""Trains a decoder to prefer some answers to others, with TRL."""

import json

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import DPOConfig, DPOTrainer

(arguments,) = HfArgumentParser(DPOConfig).parse_args_into_dataclasses()
tokenizer = AutoTokenizer.from_pretrained("base")
model = AutoModelForCausalLM.from_pretrained("base")
with open("train.jsonl") as lines:
    rows = Dataset.from_list([json.loads(line) for line in lines])
trainer = DPOTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
trainer.train()
trainer.save_model("result")
