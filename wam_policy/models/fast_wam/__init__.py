"""Fast-WAM: a video expert and an action expert in a mixture of transformers."""
