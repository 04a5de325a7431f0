"""`tg-tinker federated demo`: three sites with texts of their own train one model, beside each alone and all together."""
