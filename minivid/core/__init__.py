"""The model and the process around it: tokenizer, model, attention, noise, training, weights."""
