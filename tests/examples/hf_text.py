"""A text classifier of Hugging Face from a cache; the teacher may have had another tokenizer."""

from datasets import load_dataset
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    TrainingArguments,
)

import kdcache
from kdcache.adapters.transformers import DistillationTrainer

cache = kdcache.open_cache("runs/reviews.zarr", split="train")
reviews = load_dataset("csv", data_files="reviews.csv", split="train")
reviews = reviews.add_column("idx", range(len(reviews))).shuffle(seed=0)  # `idx` is the sample's number in the cache
tokenizer = AutoTokenizer.from_pretrained("tokenizer")
data = kdcache.join(
    reviews,
    cache,
    input_key="text",
    label_key="label",
    index_key="idx",
    transform=lambda text: tokenizer(text, truncation=True, max_length=64),
)
shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
student = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), num_labels=len(cache.classes), **shape))
trainer = DistillationTrainer(
    student,
    TrainingArguments("runs/hf-text", num_train_epochs=2, per_device_train_batch_size=8, report_to="none"),
    train_dataset=data,
    data_collator=DataCollatorWithPadding(tokenizer),
    temperature=4,
    alpha=0.9,
)
print(trainer.train().training_loss)
