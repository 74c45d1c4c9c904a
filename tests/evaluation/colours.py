"""The functions of a task of lmms-eval: pictures of one colour, made when they are asked for."""

from PIL import Image


def pictures(doc):
    return [Image.new("RGB", (60, 90), doc["colour"])]


def judge(doc, results):
    return {"right": float(doc["colour"] in results[0])}
