"""How few bits?"""
