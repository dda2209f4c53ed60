# Stands in for NVIDIA's PyTorch image where no image registry is reachable: Debian with a Python and the locked torch.
FROM localhost/debian:trixie
ENV PATH=/opt/python/bin:$PATH
RUN python3 -m venv /opt/python
COPY torch.txt /opt/python/torch.txt
RUN pip install --no-cache-dir -r /opt/python/torch.txt
