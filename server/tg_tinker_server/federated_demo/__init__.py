"""`tg-tinker federated demo`: three sites train one model, beside each of them alone and all their texts in one place."""
