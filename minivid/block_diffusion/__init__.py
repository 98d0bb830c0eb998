"""How does it go on for a minute?"""
