"""Other training programs that run this product's model; nothing here is imported before it is used."""
