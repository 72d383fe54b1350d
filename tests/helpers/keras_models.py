"""A model of Keras that is a class of its own: it pickles by its module's name."""

import keras
from keras import layers


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="outer")
        self.first = layers.Dense(72)
        self.inner = keras.Sequential([layers.Dense(72, "silu"), layers.Dense(72)], name="inner")
        self.others = [layers.Dense(64), layers.Dense(64)]

    def call(self, x, training=None):
        x = self.inner(self.first(x))
        for layer in self.others:
            x = layer(x)
        return x
