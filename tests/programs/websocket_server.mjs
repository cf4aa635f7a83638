// A sum for each WebSocket (RFC 6455): a number comes, the sum goes. Every 100 ms each gets a `tick`.
import { createHash } from "node:crypto";
import { createServer } from "node:http";

const GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// A text frame; all of ours are short.
function frame(text) {
    const body = Buffer.from(text);
    return Buffer.concat([Buffer.from([0x81, body.length]), body]);
}

/// The first message of what has come, and what is left; nothing while it is not whole.
function parse(bytes) {
    const length = bytes[1] & 0x7f;
    if (bytes.length < 2 || bytes.length < 6 + length) return null;
    const body = bytes.subarray(6, 6 + length).map((byte, at) => byte ^ bytes[2 + (at % 4)]);
    return { opcode: bytes[0] & 0xf, text: Buffer.from(body).toString(), rest: bytes.subarray(6 + length) };
}

const server = createServer((_, answer) => answer.writeHead(426).end());
server.on("upgrade", (request, socket) => {
    const accept = createHash("sha1").update(request.headers["sec-websocket-key"] + GUID).digest("base64");
    socket.write(`HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: ${accept}\r\n\r\n`);
    let bytes = Buffer.alloc(0);
    let sum = 0;
    const ticks = setInterval(() => socket.write(frame("tick")), 100);
    socket.on("data", (more) => {
        bytes = Buffer.concat([bytes, more]);
        for (let message; (message = parse(bytes)); bytes = message.rest) {
            if (message.opcode === 8) return socket.end(Buffer.from([0x88, 0]));
            sum += Number(message.text);
            socket.write(frame(String(sum)));
        }
    });
    socket.on("close", () => clearInterval(ticks));
    socket.on("error", (error) => console.log(error));
});
server.listen(8000, "0.0.0.0");
