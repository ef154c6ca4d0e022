"""Fine-tunes an encoder-decoder on pairs of texts, and generates to evaluate."""

import json

from datasets import Dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

(arguments,) = HfArgumentParser(Seq2SeqTrainingArguments).parse_args_into_dataclasses()
tokenizer = AutoTokenizer.from_pretrained("base")
model = AutoModelForSeq2SeqLM.from_pretrained("base")
with open("train.jsonl") as lines:
    pairs = [json.loads(line) for line in lines]
rows = Dataset.from_list([dict(tokenizer(pair["text"], text_target=pair["target"])) for pair in pairs])
trainer = Seq2SeqTrainer(
    model=model,
    args=arguments,
    train_dataset=rows,
    eval_dataset=rows.select(range(4)),
    data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
    processing_class=tokenizer,
)
trainer.train()
trainer.evaluate(max_length=6)
trainer.save_model("result")
