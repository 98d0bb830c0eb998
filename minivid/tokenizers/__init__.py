"""How few numbers can a clip be?"""
