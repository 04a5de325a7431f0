"""`tg-tinker federated demo`: three sites train one model, beside each of them alone and beside pooled texts."""
