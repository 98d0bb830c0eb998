"""How few weights?"""
