"""python serve.py student.tflite 8000: POST the pixels of an image, and its class comes back."""
import sys
import zipfile
from wsgiref.simple_server import make_server

import numpy as np
from ai_edge_litert.interpreter import Interpreter

try:
    classes = zipfile.ZipFile(sys.argv[1]).read("labels.txt").decode().splitlines()
    student = Interpreter(model_path=sys.argv[1], num_threads=1)
    student.allocate_tensors()
except Exception as error:  # whatever a damaged file can do to its reader
    sys.exit(f"{sys.argv[1]} is damaged, or holds no class names ({error}). Export it again.")
(pixels,), (logits,) = student.get_input_details(), student.get_output_details()


def serve(request, start):
    body = request["wsgi.input"].read(int(request["CONTENT_LENGTH"] or 0))
    if len(body) != pixels["shape"].prod():
        start("400 Bad Request", [])
        return [b"%d bytes came. Send %d x %d x %d pixels, a byte each."
                % (len(body), *pixels["shape"][1:])]
    image = np.frombuffer(body, "uint8").reshape(pixels["shape"]).astype(pixels["dtype"])
    student.set_tensor(pixels["index"], image)
    student.invoke()
    start("200 OK", [])
    return [classes[student.get_tensor(logits["index"]).argmax()].encode()]


make_server("localhost", int(sys.argv[2]), serve).serve_forever()
