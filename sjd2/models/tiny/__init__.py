"""The embedded model: a grammar of captioned scenes and its tokenizer; it is trained by sjd2/finetune/tiny."""
